# verl, with an engine that injects
# First compute Δ: drift-fast delta REASONING MULTIMODAL --out delta
# Both variables must reach every worker.
export VERL_USE_EXTERNAL_MODULES=drift_fast.integrations.verl
export DRIFT_FAST_CONFIG=$PWD/drift.yaml
torchrun --nproc-per-node 8 -m verl.trainer.sft_trainer \
    model.path=Qwen/Qwen2.5-VL-7B-Instruct \
    engine.strategy=fsdp2 \
    optim.lr=1.0e-6 \
    data.train_files=train.parquet "$@"
