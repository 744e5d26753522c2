#!/bin/sh
# Preflight and Δ. sh prepare.sh [REASONING MULTIMODAL TEXT_BASE], each a Hub id, path or URL.
set -eu
REASONING=${1:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
MULTIMODAL=${2:-Qwen/Qwen2.5-VL-7B-Instruct}
TEXT_BASE=${3:-Qwen/Qwen2.5-Math-7B}

drift-fast check "$REASONING" "$MULTIMODAL" --modules attn
drift-fast delta "$REASONING" "$MULTIMODAL" --modules attn --out delta

drift-fast check "$REASONING" "$TEXT_BASE" "$MULTIMODAL" --modules attn
drift-fast delta "$REASONING" "$TEXT_BASE" --modules attn --out delta-text
