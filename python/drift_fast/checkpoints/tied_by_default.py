"""Which models of transformers tie head and embedding where config.json says nothing of it.

transformers leaves defaults out of a config.json, so the default of the model's own class counts.
These are the `model_type`s of models that write text, and of the text models inside of others.
"""

from __future__ import annotations

TIED_BY_DEFAULT = frozenset(
    """
    aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small
    blip bloom camembert cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text cpmant ctrl
    data2vec-text deepseek_vl deepseek_vl_hybrid diffusion_gemma diffusion_gemma_text electra ernie
    ernie4_5 ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text falcon falcon_mamba florence2
    fun_asr_nano gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox_japanese granite_docling granite_docling_text granite_speech
    granite_speech_plus granite_swa hunyuan_vl hunyuan_vl_text hyperclovax_vision_v2 internvl janus
    jetmoe kimi_k25 kosmos-2 kosmos-2.5 lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr
    mamba marian mbart megatron-bert minicpm3 minicpm_ocr mistral3 modernbert-decoder
    moss_transcribe_diarize mpt mvp openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text paligemma
    pegasus plbart pp_chart2table prophetnet qwen2_5_omni_text qwen3_asr qwen3_vl_moe_text
    recurrent_gemma roberta roberta-prelayernorm roc_bert roformer shieldgemma2 smollm3
    speech_to_text starcoder2 t5gemma2 t5gemma2_text trocr udop vaultgemma voxtral_realtime whisper
    xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905
)
