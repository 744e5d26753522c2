#!/bin/sh
# Preflight and the Δ of ours.yaml. sh prepare_ours.sh [REASONING MULTIMODAL], as prepare.sh.
set -eu
REASONING=${1:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
MULTIMODAL=${2:-Qwen/Qwen2.5-VL-7B-Instruct}

drift-fast check "$REASONING" "$MULTIMODAL" --modules attn,mlp
drift-fast delta "$REASONING" "$MULTIMODAL" --modules attn,mlp --out delta-both
