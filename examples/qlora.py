"""QLoRA: the weights are in 4 bits, Δ comes from the two unquantized checkpoints.

What a step needs is Δ and the factors; how the frozen weights are stored plays no part in it.
"""

import tempfile

import peft
import tiny
import torch
import transformers

import drift_fast

device = "cuda" if torch.cuda.is_available() else "cpu"

with tempfile.TemporaryDirectory() as folder:
    # Blocks of 64 elements share a scale, and on a CPU each row is whole blocks.
    tiny.TEXT |= {"hidden_size": 64, "intermediate_size": 128}
    _, delta = tiny.pair(folder, text_only=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/multimodal",
        dtype=torch.bfloat16,
        device_map={"": device},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
        for batch in tiny.batches(4):
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
            injection.step()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"λ after 4 steps: {injection.metrics()['progress']:.4f}")
