"""The moments of un-rotated keys; how the rotation is found is tested beside the runtime."""

import torch

from kvcompress.profile.collect import key_moments
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.model.rotation import find_rotations


def test_moments_are_those_of_the_projection(llama, prompt):
    shape = shape_of(llama.config, llama.dtype)
    projected = []
    handle = llama.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: projected.append(out[0])
    )
    turned = [found.rotation for found in find_rotations(llama, shape, token=7)]
    stats = key_moments(llama, shape, turned, prompt)
    handle.remove()
    key = projected[-1].double().unflatten(-1, (2, 16)).transpose(0, 1)
    assert stats[0].count == len(prompt)
    # float32 rotation forth, float64 back
    torch.testing.assert_close(stats[0].mean, key.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[0].var, key.var(1, correction=0), rtol=1e-4, atol=1e-5)
