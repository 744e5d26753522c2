# $title
# $first
# Both variables must reach every worker.
export VERL_USE_EXTERNAL_MODULES=drift_fast.integrations.verl
export DRIFT_FAST_CONFIG=$$PWD/drift.yaml
torchrun --nproc-per-node 8 -m verl.trainer.sft_trainer \
    model.path=$multimodal \
@lora     model.lora_rank=$rank \
@lora     model.lora_alpha=$lora_alpha \
    engine.strategy=fsdp2 \
    optim.lr=$learning_rate \
    data.train_files=train.parquet "$$@"
