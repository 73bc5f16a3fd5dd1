"""SmolLM2-135M-Instruct turned into a masked-diffusion LLM: a real pretrained model as test-bed.

`base` fetches and reads the pretrained model, `delta` is what turns it into a masked-diffusion model, `build` merges
the two into a checkpoint folder; `sums`, `reading`, `lists` and `programs` generate the items of its tasks; `train`
trains a delta.
"""
