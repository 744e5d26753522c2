#!/bin/sh
# MathVista, MathVision, MathVerse, WeMath and LogicVista, before and after. Not run by any test: they
# download, take GPUs, and ask a model over an API to judge (OPENAI_API_KEY).
# sh evaluate.sh vlmevalkit PATH_OF_VLMEVALKIT | sh evaluate.sh lmms-eval [MODEL]
set -eu
GPUS=${GPUS:-8}
HERE=$(pwd)
case ${1:-} in
vlmevalkit)
    # Model paths in vlmevalkit.json are relative to where it is run, and older VLMEvalKits tell a
    # Qwen2.5-VL from a Qwen2-VL by its path alone: saves is linked there under a name that says it.
    cd "$2"
    ln -sfn "$HERE/saves" saves-qwen2_5_vl
    torchrun --nproc-per-node "$GPUS" run.py --config "$HERE/vlmevalkit.json" \
        --work-dir "$HERE/evaluation" --reuse
    ;;
lmms-eval)
    # As many new tokens as in vlmevalkit.json: MathVerse's own limit is 1,024. Without DEBUG lmms-eval
    # prints an error and exits with 0.
    accelerate launch --num_processes "$GPUS" -m lmms_eval \
        --model qwen2_5_vl \
        --model_args "pretrained=${2:-saves/paper},max_pixels=12845056,attn_implementation=sdpa" \
        --tasks mathvista_testmini_cot,mathvision_test,mathverse_testmini_vision_only,wemath_testmini_reasoning,logicvista_reasoning \
        --gen_kwargs max_new_tokens=8192 --verbosity DEBUG \
        --batch_size 1 --log_samples --output_path evaluation/lmms-eval
    ;;
*)
    echo "usage: sh evaluate.sh vlmevalkit PATH | lmms-eval [MODEL]" >&2
    exit 2
    ;;
esac
