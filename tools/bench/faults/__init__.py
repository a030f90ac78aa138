"""Wrong rewrites, planted one at a time in copies of real passes, to see that each is caught.

    python -m planish.tools.bench.faults [--jobs N] [--only REGEX] [--bisect] [--repro] [--reduce N]

``FAULTS`` is the catalogue; ``Planted`` is the pass that plants one, which a recipe can hold.
"""

from planish.tools.bench.faults.catalogue import FAULTS
from planish.tools.bench.faults.planted import Planted
from planish.tools.bench.faults.spec import Fault

__all__ = ["FAULTS", "Fault", "Planted"]
