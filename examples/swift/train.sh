# ms-swift, with a callback
# First compute Δ: drift-fast delta REASONING MULTIMODAL --out delta
# float32 weights under autocast: weights in bfloat16 alone lose most steps of fine-tuning.
DRIFT_FAST_CONFIG=drift.yaml swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --model_type qwen2_5_vl \
    --template qwen2_5_vl \
    --tuner_type full \
    --torch_dtype float32 \
    --bf16 true \
    --freeze_vit true \
    --freeze_aligner true \
    --dataset train.jsonl \
    --split_dataset_ratio 0 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1.0e-6 \
    --logging_steps 10 \
    --output_dir saves/drift \
    --external_plugins plugin.py \
    --callbacks drift_fast "$@"
