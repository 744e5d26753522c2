"""Lightning: one callback; λ is logged as `drift/progress`."""

import tempfile

import lightning.pytorch as pl
import tiny
import torch

from drift_fast.integrations.lightning import DriftCallback


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    trainer = pl.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DriftCallback(delta, alpha=1.0)],
    )
    trainer.fit(Module(model), torch.utils.data.DataLoader(tiny.samples(32), batch_size=4))
    print(f"λ after 4 steps: {trainer.callback_metrics['drift/progress']:.4f}")
