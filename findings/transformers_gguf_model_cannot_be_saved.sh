#!/usr/bin/env bash
# transformers: can a model that was loaded from a GGUF file, and so dequantised, be saved with save_pretrained?
#
# Guess (75 %): yes; loading gives plain nn.Linear layers in float32, and saving them is the way back to an ordinary folder.
# What happens: save_pretrained raises ValueError: the model "is quantized with gguf and is not serializable", although
#   every layer is plain. Copying the state into a fresh model without `quantization_config` saves and reads back exactly.
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0.
# Who meets it: who fine-tunes from a GGUF base and keeps weights at the end: the training is done when the error comes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
heads = 4
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=heads,
                     tie_word_embeddings=False)
source = LlamaForCausalLM(config).eval()
names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_context_length(config.max_position_embeddings)
writer.add_embedding_length(config.hidden_size)
writer.add_block_count(1)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_vocab_size(config.vocab_size)
writer.add_tokenizer_model("gpt2")
writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
for name, tensor in source.state_dict().items():
    short = name.removesuffix(".weight").removeprefix("model.layers.0.")
    value = tensor.numpy().astype(np.float32)
    if short.endswith(("q_proj", "k_proj")):  # llama.cpp interleaves the two halves of each head
        value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    block = "blk.0." if ".layers." in name else ""
    writer.add_tensor(f"{block}{names[short]}.weight", value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf").eval()
tokens = torch.arange(3, 11)[None]
with torch.no_grad():
    gap = float((loaded(tokens).logits - source(tokens).logits).abs().max())
kinds = {type(m).__name__ for n, m in loaded.named_modules() if n.endswith("_proj")}
print("loaded from GGUF:", kinds, {p.dtype for p in loaded.parameters()}, "logits differ by", gap)
assert kinds == {"Linear"} and gap < 1e-5
try:
    loaded.save_pretrained("saved")
except ValueError as error:
    said = str(error)
else:
    raise SystemExit("save_pretrained no longer refuses")
print("save_pretrained:", said.splitlines()[0])
assert "not serializable" in said
plain = LlamaForCausalLM(loaded.config)
plain.load_state_dict(loaded.state_dict())
del plain.config.quantization_config
plain.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved").eval()
with torch.no_grad():
    gap = float((again(tokens).logits - source(tokens).logits).abs().max())
print("copied into a fresh model, saved and read again: logits differ by", gap)
assert gap < 1e-5
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
