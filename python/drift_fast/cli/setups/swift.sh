# $title
# $first
# float32 weights under autocast: weights in bfloat16 alone lose most steps of fine-tuning.
DRIFT_FAST_CONFIG=drift.yaml swift sft \
    --model $multimodal \
    --model_type $swift_type \
    --template $swift_type \
@full     --tuner_type full \
@full     --torch_dtype float32 \
@lora     --tuner_type lora \
@lora     --target_modules all-linear \
@lora     --lora_rank $rank \
@lora     --lora_alpha $lora_alpha \
@lora     --torch_dtype bfloat16 \
    --bf16 true \
    --freeze_vit true \
    --freeze_aligner true \
    --dataset $data \
    --split_dataset_ratio 0 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --learning_rate $learning_rate \
    --logging_steps 10 \
    --output_dir saves/drift \
    --external_plugins plugin.py \
    --callbacks drift_fast "$$@"
