"""The zoo: a toy model of random weights for every architecture that TOYS names.

Token ids below TEXT are plain text; a wrapper's image, audio and video tokens lie above.
"""

import copy
import dataclasses

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

VOCAB, TEXT = 128, 100
# what a size is in every toy, by the names that config classes have for it
SIZES = {
    32: "hidden_size n_embd d_model embed_dim word_embed_proj_dim attention_hidden_size "
        "lru_width embedding_dim out_hidden_size moe_intermediate_size "
        "shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
        "projection_dim expert_ffn_hidden_size moe_shared_expert_intermediate_size output_dim "
        "text_hidden_size projector_hidden_size projection_hidden_dim projection_hidden_size "
        "alignment_intermediate_size projector_input_dim projector_output_dim output_proj_dims "
        "mm_embed_dim audio_embed_dim vision_hidden_size image_token_embed_dim encoder_hidden_size "
        "base_channels latent_channels output_channels adapter_in_dim adapter_out_dim "
        "adapter_input_size downsample_hidden_size projection_intermediate_size moe_hidden_size",
    64: "intermediate_size n_inner ffn_dim dff dim_ff ffn_hidden_size intermediate_size_mlp "
        "shared_intermediate_size dense_intermediate_size mlp_dim sliding_window encoder_ffn_dim "
        "attention_window_size sliding_window_size local_attention attention_chunk_size "
        "position_embedding_size num_position_embeddings num_embeddings mm_posemb_size "
        "codebook_size",
    4: "num_attention_heads n_head n_heads num_heads attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
       "linear_num_value_heads swa_num_attention_heads index_n_heads encoder_attention_heads "
       "linear_num_heads num_sliding_attention_heads zero_expert_num resampler_n_latents",
    2: "num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok moe_topk moe_k moe_top_k "
       "num_hidden_layers n_layer n_layers num_layers depth num_blocks linear_num_key_heads "
       "swa_num_key_value_heads encoder_layers resampler_n_heads",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group n_groups "
       "mamba_n_groups first_k_dense_replace num_dense_layers resampler_depth",
    0: "num_mtp_layers num_nextn_predict_layers",
    8: "head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim "
       "linear_value_head_dim index_head_dim mamba_d_state state_size ssm_state_size dim_head "
       "time_step_rank mamba_dt_rank rotary_dim kv_channels linear_head_dim adapter_rank "
       "laurel_rank hidden_size_per_layer_input resampler_head_dim block_multiple_of "
       "router_hidden_size pos_emb_height pos_emb_width",
    16: "kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_chunk_size "
        "chunk_size qk_head_dim",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    VOCAB: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
}
COMMON = {field: size for size, fields in SIZES.items() for field in fields.split()}
# these may be None by default, and some models fail so
NEVER_UNSET = ("head_dim", "num_key_value_heads")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
           "attention_multiplier": 0.25}
COMPASS = {"layer_types": [SLIDING, FULL],
           "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                               FULL: None}}
DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
         "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
         "swa_v_head_dim": 8}
# the last layers of these two take keys and values from earlier ones
GEMMA3N = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 2,
           "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}
GEMMA4 = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 2,
          "global_head_dim": 16, "final_logit_softcapping": 30.0, "use_double_wide_mlp": True}
# no v_proj where attention is full, and routed experts beside the MLP
GEMMA4_MOE = {"layer_types": [SLIDING, FULL], "attention_k_eq_v": True, "global_head_dim": 16,
              "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
              "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
              "moe_intermediate_size": 16, "final_logit_softcapping": 30.0}
GEMMA4_UNIFIED = {"layer_types": [SLIDING, FULL], "global_head_dim": 16}
QWEN4 = {"head_dim": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
         "indexer_budget": 2048, "indexer_compress_ratio": 4, "hc_lowrank": 8}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"],
         "num_key_value_heads": 4}


def mrope(*section, **more):
    """Rotary embeddings in sections, over heads of width 16."""
    return {"head_dim": 16, "hidden_size": 64, **more,
            "rope_parameters": {"mrope_section": list(section)}}


TOYS: dict[str, dict] = {name: {} for name in """
afmoe apertus arcee aria aria_text axk1 axk2 bailing_hybrid beam biogpt bitnet bloom codegen
cosmos3_omni cpmant ctrl cwm deepseek_v3 deepseek_v32 deepseek_vl deepseek_vl_hybrid diffllama doge
ernie4_5 ernie4_5_moe exaone4 exaone4_5 exaone_moe falcon falcon_mamba fast_vlm flex_olmo fuyu gemma
gemma2 gemma3 gemma3_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt2 gpt_bigcode
gpt_neox gpt_neox_japanese gpt_oss gptj helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling2_text internlm3 internvl
iquestcoder jais2 jetmoe kimi_k25 kimi_linear kolibri1 kosmos-2.5 lfm3 lfm3_vl lighton_ocr llama
llava llava_next llava_next_video llava_onevision longcat_flash mamba mimo_v2_flash minicpm_ocr
minicpmv4_6 minicpmv4_7 minimax minimax_m2 ministral3 mistral mistral3 mistral4 mistral_large4
mixtral moss_transcribe_diarize mpt muse_glimmer nanochat nemotron nemotron_h olmo olmo2 olmo3
olmo_hybrid olmoe openai-gpt opt ovis2 paligemma perception_lm persimmon phi phimoe qianfan_ocr
qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smolvlm solar_open stablelm starcoder2 vaultgemma
video_llama_3 video_llava vipllava xglm
""".split()} | {
    "aya_vision": {"text_config": {"logit_scale": 0.5}},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": TEXT}, "vq_config": {"channel_multiplier": (1, 1)}},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere2_vision": {"text_config": {"logit_scale": 0.5}},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cosmos3_edge": {"text_config": mrope(4, 2, 2)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"vision_config": {"sam_config": {"downsample_channels": [8, 32],
                                                       "global_attn_indexes": (1,)}},
                      "text_config": {"n_routed_experts": 4, "num_experts_per_tok": 2,
                                      "mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v2.lite": {"num_experts_per_tok": 2, "q_lora_rank": None},
    "deepseek_v4": {"head_dim": 16, "o_groups": 2, "num_key_value_heads": 1,
                    "num_hidden_layers": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3, "vision_config": {"mlp_layer_types": ["dense"]}},
    "dots3_note_text": DOTS3,
    "emu3": {"vocabulary_map": {"<image>": TEXT}, "vq_config": {"channel_multiplier": (1, 1)}},
    "ernie4_5_vl_moe": {"text_config": mrope(2, 2, 4, moe_intermediate_size=[32, 16])},
    "falcon.alibi": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
    "falcon.new": {"new_decoder_architecture": True, "multi_query": False},
    "falcon_h1": {"mamba_d_ssm": 64, "key_multiplier": 0.5, "ssm_in_multiplier": 0.5,
                  "lm_head_multiplier": 0.5, "mlp_multipliers": [0.5, 2.0]},
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n": {"text_config": {**GEMMA3N, "vocab_size_per_layer_input": TEXT},
                "vision_config": {"model_type": "siglip_vision_model", "vocab_size": 8,
                                  "vocab_offset": TEXT, "rms_norm_eps": 1e-6},
                "audio_config": {"vocab_size": 8, "vocab_offset": TEXT + 8}},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4, "vision_config": {"num_key_value_heads": 4}},
    "gemma4.moe": {"text_config": GEMMA4_MOE, "vision_config": {"num_key_value_heads": 4},
                   "audio_config": None},
    "gemma4_text": GEMMA4,
    "gemma4_text.moe": GEMMA4_MOE,
    "gemma4_unified": {"text_config": GEMMA4_UNIFIED},
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "glm46v": {"text_config": mrope(2, 3, 3)},
    "glm4v": {"text_config": mrope(2, 3, 3)},
    "glm4v_moe": {"text_config": mrope(2, 1, 1)},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "glm_ocr": {"text_config": mrope(2, 3, 3)},
    "glmga": {"text_config": mrope(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "granite": GRANITE,
    "granite4_vision": {"text_config": GRANITE, "vision_config": {"hidden_size": 64},
                        "deepstack_layer_map": [[-1, 1]], "spatial_target_layers": [1],
                        "downsample_rate": "1/2", "image_grid_pinpoints": [[64, 64]]},
    "granite_docling": {"text_config": GRANITE},
    "granite_swa": GRANITE,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE,
    "granitemoehybrid": {**GRANITE, "layer_types": [LINEAR, FULL]},
    "granitemoehybrid.dense": {**GRANITE, "layer_types": [LINEAR, FULL], "num_local_experts": 0,
                               "position_embedding_type": "rope"},
    "granitemoeshared": GRANITE,
    "hunyuan_vl": {"text_config": mrope(2, 2, 2, 2)},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus": {"vq_config": {"channel_multiplier": (1, 1), "num_patches": 2}},
    "laguna": {"layer_types": [FULL, SLIDING], "num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", FULL]}},
    "llama4": {"vision_config": {"vision_output_dim": 32},
               "text_config": {"moe_layers": [1], "interleave_moe_layer_step": 2,
                               "no_rope_layers": [1, 0]}},
    "llama4_text": {"moe_layers": [1], "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": [FULL, SLIDING]},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 16},
    "minimax_m3_vl": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"layer_types": [SLIDING, FULL]},
    "mistral3.ministral3": {"text_config": {"model_type": "ministral3"}},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "modernbert-decoder": {"local_attention": 128},
    "molmo2": {"vision_config": {"image_size": [28, 28], "num_position_embeddings": 4},
               "adapter_config": {"vision_feature_layer": [1, 0]}},
    "moshi": {"audio_encoder_config": {"num_filters": 4, "codebook_dim": 8, "upsample_groups": 4}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8),
                                    "depths": (1, 1, 1, 1), "hidden_size": 8}},
    "nemotron_h_omni": {"vision_config": {"model_type": "radio", "max_img_size": 32,
                                          "video_temporal_patch_size": 2},
                        "text_config": {"model_type": "nemotron_h"}},
    "paddleocr_vl": {"text_config": mrope(2, 3, 3)},
    "perception_lm": {"vision_config": {"model_type": "clip_vision_model",
                                        "model_args": {"embed_dim": 32}}},
    "phi3": {"original_max_position_embeddings": 512},
    "phi4_multimodal": {"original_max_position_embeddings": 512,
                        "vision_config": {"crop_size": 28},
                        "audio_config": {"ext_pw_out_channel": 32, "nemo_conv_channels": 32,
                                         "depthwise_separable_out_channel": 32,
                                         "bias_max_distance": 16}},
    "qwen2.sliding": {"use_sliding_window": True, "layer_types": [SLIDING, FULL],
                      "sliding_window": 64},
    "qwen2_5_omni_thinker": {"text_config": mrope(2, 3, 3), "vision_start_token_id": VOCAB - 1},
    "qwen2_5_vl": {"text_config": mrope(2, 3, 3)},
    "qwen2_vl": {"text_config": mrope(2, 3, 3), "vision_config": {"hidden_size": 64}},
    "qwen3_5": {"text_config": mrope(2, 1, 1, head_dim=32)},
    "qwen3_5_moe": {"text_config": mrope(2, 1, 1, head_dim=32)},
    "qwen3_5_moe_text": mrope(2, 1, 1, head_dim=32),
    "qwen3_5_text": mrope(2, 1, 1, head_dim=32),
    "qwen3_next": {"head_dim": 32},
    "qwen3_omni_moe_thinker": {"text_config": mrope(4, 2, 2), "vision_start_token_id": VOCAB - 1},
    "qwen3_vl": {"text_config": mrope(4, 2, 2)},
    "qwen3_vl_moe": {"text_config": mrope(4, 2, 2)},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "step3p7": {"text_config": {"layer_types": [FULL, SLIDING], "sliding_window": 64}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": (8, 8),
                                                       "global_attn_indexes": (1,)}}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "youtu": {"pad_token_id": None},
    "zamba": {**ZAMBA, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {**ZAMBA, "n_mamba_heads": 4, "use_shared_attention_adapter": True},
    "zaya": {"num_experts_per_tok": 1},
}
# "gemma4.moe" is another gemma4; "kosmos-2.5" is a model type
MODEL_TYPES = {name: name if name in CONFIG_MAPPING else name.partition(".")[0] for name in TOYS}
# the text's blocks are nested in these
WRAPPERS = tuple(name for name, kind in MODEL_TYPES.items()
                 if "text_config" in (getattr(CONFIG_MAPPING[kind], "sub_configs", None) or ()))


def value(config, field):
    """A config's value of a field; () where it has none, or one per layer."""
    try:
        return getattr(config, field, ())
    except RuntimeError:
        return ()


def default(kind):
    """A config class as it comes, or None where it cannot come without arguments."""
    try:
        return kind()
    except Exception:
        return None


def is_config(kind):
    """Whether a class is the config of a model type, and not of any."""
    return dataclasses.is_dataclass(kind) and bool(getattr(kind, "model_type", None))


def sizes_of(fields, was):
    """The common sizes that a config has fields for; what it leaves unset stays so."""
    sizes = {field: COMMON[field] for field in fields if field in COMMON
             and (value(was, field) is not None or field in NEVER_UNSET)}
    if "kv_lora_rank" in fields:                             # keys and values have one latent
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if isinstance(value(was, "image_size"), int) and isinstance(value(was, "patch_size"), int):
        sizes["image_size"] = 2 * was.patch_size
    return sizes


def layers_of(fields, was, special):
    """How many layers, and their kinds in turn: every kind that the default config has."""
    count = next((field for field in COUNTS if field in fields), None)
    if count is None:
        return {}
    kinds = {field: special.get(field, value(was, field)) for field in KINDS if field in fields}
    kinds = {field: list(found if field in special else dict.fromkeys(found))
             for field, found in kinds.items() if isinstance(found, (list, tuple))}
    number = special.get(count, max([2, *map(len, kinds.values())]))
    return {count: number} | {field: [found[i % len(found)] for i in range(number)]
                              for field, found in kinds.items()}


def tokens_of(fields, was):
    """Ids of special tokens; a wrapper's are the same in all its parts."""
    known = {"pad": 0, "bos": 1, "eos": 2, "image": TEXT, "video": TEXT + 1, "audio": TEXT + 2}
    free = iter(range(TEXT + 3, VOCAB))
    tokens = {}
    for field in fields:
        stem, _, end = field.partition("_token_")
        if end in ("id", "index") and (stem in ("pad", "bos", "eos")
                                       or isinstance(value(was, field), int)):
            tokens[field] = known[stem] if stem in known else next(free)
    return tokens


def parts_of(kind, was, special):
    """The configs inside a wrapper's: of the text, the vision, the audio."""
    parts = {}
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        part, want = value(was, name) or None, special.get(name, {})
        if want is None:
            continue
        if "model_type" in want:
            inner, part = CONFIG_MAPPING[want["model_type"]], None
        elif part is not None:
            inner = type(part)
        if is_config(inner):
            parts[name] = {**toy(inner, want, part), "model_type": inner.model_type}
        elif dataclasses.is_dataclass(inner):
            parts[name] = toy(inner, want, part)
    return parts


def toy(kind, special, was=None):
    """The arguments that make a config of class `kind` tiny; `special` says what is beyond."""
    was = was or default(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    layers, parts = layers_of(fields, was, special), parts_of(kind, was, special)
    rope = {**(value(was, "rope_parameters") or {}), **special.get("rope_parameters", {})}
    return (sizes_of(fields, was) | tokens_of(fields, was) | special | layers | parts
            | ({"rope_parameters": rope} if rope else {}))


def config_of(name: str) -> PretrainedConfig:
    """The toy config of an architecture."""
    kind = CONFIG_MAPPING[MODEL_TYPES[name]]
    arguments = toy(kind, copy.deepcopy(TOYS[name]))
    config = kind(**arguments)
    for part, want in TOYS[name].items():                    # a tower in place of one from timm
        other = want.get("model_type") if isinstance(want, dict) else None
        if other and not isinstance(value(config, part), CONFIG_MAPPING[other]):
            vars(config)[part] = CONFIG_MAPPING[other](**arguments[part])    # past its validation
    return config


def fan_in(module, weight):
    """How many numbers each output of a matrix sums over; None where a weight is no matrix."""
    if isinstance(module, Conv1D):
        return weight.shape[0]
    if "conv" in type(module).__name__.lower():
        return weight[0].numel() if weight.ndim > 2 else None
    if isinstance(module, nn.Linear):
        return weight.shape[-1]
    if weight.ndim == 3 and 1 not in weight.shape:           # experts, which lie either way
        return min(weight.shape[1:])
    return None


def randomise(model):
    """Draws matrices so wide that logits differ; norms and recurrences stay as they are."""
    for path, module in model.named_modules():
        if path.endswith("dt_proj"):                         # its bias sets how fast a state fades
            continue
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                weight.normal_(std=0.2)
            elif name == "bias" and isinstance(module, (nn.Linear, Conv1D)):
                weight += 0.1 * torch.randn_like(weight)     # a gate's bias starts far from 0
            elif name == "weight" and weight.ndim == 2 and fan_in(module, weight) is None:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif weight.ndim > 1 and fan_in(module, weight):
                weight.normal_(std=fan_in(module, weight) ** -0.5)


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """A toy model in float32 on the CPU, in eval mode."""
    torch.manual_seed(seed)
    wrapped = MODEL_TYPES[name] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    model = auto.from_config(config_of(name), dtype=torch.float32)
    with torch.no_grad():
        randomise(model)
    return model.eval()
