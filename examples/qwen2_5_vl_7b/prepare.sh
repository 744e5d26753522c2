#!/bin/sh
# Preflight and the Δ of paper.yaml. sh prepare.sh [REASONING MULTIMODAL], each a Hub id, path or URL.
set -eu
REASONING=${1:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
MULTIMODAL=${2:-Qwen/Qwen2.5-VL-7B-Instruct}

drift-fast check "$REASONING" "$MULTIMODAL" --modules attn
drift-fast delta "$REASONING" "$MULTIMODAL" --modules attn --out delta
