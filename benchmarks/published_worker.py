"""Training steps of the paper's JAX code, one per line on stdin; started by published_code.py with a Python that has JAX.

    PYTHON published_worker.py CODE constraint batch

CODE is a checkout of the paper's repository, whose modules are imported unchanged. Prints the number of parameters, then after each step its
processor time and elapsed time. Needs neither torch nor robustlip.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

CONFIG = {
    "data": "shakespeare", "vocab_size": 65, "num_heads": 4, "d_embed": 256, "num_blocks": 3, "blocks_mass": 16, "softmax_scale": 1, "final_scale": 1,
    "residual_scale": 1, "scales_learnable": False, "zero_init": False, "max_embed_inflation_factor": 16, "use_unembed": False,
    "layernorm_substitute": "none", "model_dtype": "float32", "project_dtype": "float32", "w_max": 2.0, "wd": 0, "spectral_wd": 0, "lr": 0.1,
    "optimizer": "muon", "beta1": 0.9, "beta2": 0.95, "pre_dualize": False, "post_dualize": True,
}  # fmt: skip


def main() -> None:
    code, constraint, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, code)
    from configs import parse_config_from_json
    from optimizers import get_optimizer

    from models import create_model

    config = parse_config_from_json(CONFIG | {"project": {"default": constraint}})
    model, optimizer = create_model(config), get_optimizer(config)
    model.jit()
    key = jax.random.PRNGKey(0)
    weights = model.initialize(key)
    state = optimizer.init_state(weights)
    tokens = jnp.asarray(np.random.default_rng(0).integers(65, size=(batch, 257)))

    @jax.jit
    @jax.value_and_grad
    def loss_and_grad(weights, inputs, targets):
        scores = jax.nn.log_softmax(model(inputs, weights))
        return -jnp.take_along_axis(scores, targets[..., None], -1).mean()

    print(sum(w.size for w in jax.tree.leaves(weights)), flush=True)
    for _ in sys.stdin:
        spent, started = time.process_time(), time.perf_counter()
        loss, grads = loss_and_grad(weights, tokens[:, :-1], tokens[:, 1:])
        _, state, updates = optimizer.update(weights, grads, state)
        updates = model.dualize(updates)
        key, used = jax.random.split(key)
        weights = model.decay_step_project(weights, updates, w_max=config.w_max, wd=0, spectral_wd=0, lr=config.lr, key=used)
        jax.block_until_ready(weights)
        assert np.isfinite(float(loss))
        print(time.process_time() - spent, time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
