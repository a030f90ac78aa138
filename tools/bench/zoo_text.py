"""Text models of the transformers family: encoders, decoders, and pairs of both."""

from planish.tools.bench.zoo_tiny import DECODER, ENCODER, GROUPED, PAIR, VOCABULARY, Tiny

ENCODERS = (
    Tiny(name="bert", model="BertModel", options=ENCODER, dynamic=True),
    Tiny(name="bert-eager", model="BertModel", options=ENCODER, dynamic=True, eager=True),
    Tiny(name="bert-mlm", model="BertForMaskedLM", options=ENCODER),
    Tiny(name="bert-qa", model="BertForQuestionAnswering", options=ENCODER, dynamic=True),
    Tiny(name="roberta", model="RobertaForSequenceClassification", options=ENCODER, dynamic=True),
    Tiny(
        name="distilbert",
        model="DistilBertModel",
        options={
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
        dynamic=True,
    ),
    Tiny(
        name="albert", model="AlbertModel", options={**ENCODER, "embedding_size": 16}, dynamic=True
    ),
    Tiny(
        name="electra",
        model="ElectraModel",
        options={**ENCODER, "embedding_size": 16},
        dynamic=True,
    ),
    Tiny(
        name="deberta-v2",
        model="DebertaV2Model",
        options={
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
        },
    ),
    Tiny(name="mpnet", model="MPNetModel", options=ENCODER, dynamic=True),
    Tiny(
        name="modernbert",
        model="ModernBertModel",
        options={
            **ENCODER,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "reference_compile": False,
        },
    ),
    Tiny(name="roformer", model="RoFormerModel", options={**ENCODER, "embedding_size": 32}),
    Tiny(
        name="squeezebert",
        model="SqueezeBertModel",
        options={
            **ENCODER,
            "embedding_size": 32,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
)
DECODERS = (
    Tiny(
        name="gpt2",
        model="GPT2LMHeadModel",
        options={
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
        },
        inputs="cacheless",
        dynamic=True,
    ),
    Tiny(
        name="gpt2-eager",
        model="GPT2Model",
        options={
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
        },
        eager=True,
    ),
    Tiny(
        name="gpt-neo",
        model="GPTNeoModel",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "max_position_embeddings": 64,
            "window_size": 4,
            "use_cache": False,
        },
    ),
    Tiny(
        name="gptj",
        model="GPTJModel",
        options={
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "use_cache": False,
        },
    ),
    Tiny(name="gpt-neox", model="GPTNeoXModel", options=DECODER, dynamic=True),
    Tiny(name="llama", model="LlamaForCausalLM", options=GROUPED, dynamic=True),
    Tiny(
        name="llama-eager",
        model="LlamaForCausalLM",
        options=GROUPED,
        inputs="ids",
        dynamic=True,
        eager=True,
    ),
    Tiny(
        name="mistral", model="MistralModel", options={**GROUPED, "sliding_window": 6}, dynamic=True
    ),
    Tiny(name="qwen2", model="Qwen2ForCausalLM", options=GROUPED, dynamic=True),
    Tiny(name="qwen3", model="Qwen3Model", options={**GROUPED, "head_dim": 8}),
    Tiny(name="gemma", model="GemmaModel", options={**GROUPED, "head_dim": 8}, dynamic=True),
    Tiny(
        name="gemma2", model="Gemma2Model", options={**GROUPED, "head_dim": 8, "sliding_window": 6}
    ),
    Tiny(name="phi", model="PhiForCausalLM", options=DECODER),
    Tiny(name="olmo", model="OlmoModel", options=DECODER),
    Tiny(name="stablelm", model="StableLmModel", options=GROUPED),
    Tiny(
        name="opt",
        model="OPTForCausalLM",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        dynamic=True,
    ),
    Tiny(
        name="bloom",
        model="BloomModel",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
        },
        dynamic=True,
    ),
    Tiny(
        name="falcon",
        model="FalconModel",
        options={**DECODER, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
    ),
)
PAIRS = (
    Tiny(
        name="t5",
        model="T5Model",
        options={
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        inputs="pair",
        dynamic=True,
    ),
    Tiny(
        name="t5-encoder",
        model="T5EncoderModel",
        options={
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
        dynamic=True,
    ),
    Tiny(name="bart", model="BartModel", options=PAIR, inputs="pair", dynamic=True),
    Tiny(
        name="marian",
        model="MarianModel",
        options={**PAIR, "pad_token_id": 1, "decoder_start_token_id": 1},
        inputs="pair",
    ),
)
