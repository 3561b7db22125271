"""The process of `attnlab.bench.cpu` in which PyTorch computes: run as a file, it needs nothing of attnlab.

Requests and answers are lines of JSON. `build` makes a case and writes what it computes; `forward` and `step` time it.
"""

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

ROUND = 0.02  # seconds of calls that are timed together


def median_seconds(call: Callable[[], Any], budget: float) -> float:
    """Median seconds of a call."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    first = [run(1), run(1)]
    count = max(1, min(1000, int(ROUND / max(min(first), 1e-7))))
    times = first if count == 1 else []
    while len(times) < 3 or sum(times) * count < budget:
        times.append(run(count))
    return statistics.median(times)


def build(case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Calls, forward and step, and the number of parameters; what the step computes is written to `outputs`."""
    import numpy as np
    import torch

    with np.load(case["inputs"]) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    if case["kind"] in ("model", "language"):
        return _model(case, arrays["x"])
    if case["kind"] == "sparse":
        return _sparse(case, arrays)
    dy = arrays.pop("dy")
    function = {"op": _op, "mixer": _mixer, "depthwise": _depthwise}[case["kind"]](case)
    leaves = {name: array.requires_grad_() for name, array in arrays.items()}

    def forward() -> Any:
        with torch.no_grad():
            return function(leaves)

    def step() -> Any:
        y = function(leaves)
        return y, torch.autograd.grad(y, list(leaves.values()), dy)

    y, gradients = step()
    named = dict(zip(leaves, gradients, strict=True))
    np.savez(case["outputs"], y=y.detach().numpy(), **{name: g.numpy() for name, g in named.items()})
    return forward, step, 0


def _op(case: dict[str, Any]) -> Callable[[Any], Any]:
    from torch.nn.functional import scaled_dot_product_attention

    def function(a: dict[str, Any]) -> Any:
        q, k, v = (a[name].transpose(1, 2) for name in "qkv")
        return scaled_dot_product_attention(q, k, v, is_causal=case["causal"]).transpose(1, 2)

    return function


def _sparse(case: dict[str, Any], arrays: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Attention under the rule of `attnlab.bench.sparse_torch`, by a mask of all pairs or by FlexAttention."""
    import numpy as np
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    dy = arrays["dy"]
    leaves = [arrays[name].requires_grad_(case["mode"] == "gradient") for name in "qkv"]
    n = leaves[0].shape[1]
    bounds = [(arrays[f"first{a}"], arrays[f"last{a}"]) for a in range(len(case["lengths"]))]

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen, stride = None, 1
        for (first, last), length, period in reversed(list(zip(bounds, case["lengths"], case["periods"], strict=True))):
            own_i, own_j = (x if stride == 1 else x // stride for x in (i, j))
            if stride * length < n:
                own_i, own_j = own_i % length, own_j % length
            inside = (own_j >= first[own_i]) & (own_j <= last[own_i])
            if period > 1:
                inside = inside & (own_i % period == own_j % period)
            seen = inside if seen is None else seen & inside
            stride *= length
        return seen | (j < case["prefix"]) if case["prefix"] else seen

    if case["contender"] == "flex":
        mask = create_block_mask(rule, None, None, n, n, device="cpu")
        compiled = torch.compile(flex_attention)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return compiled(q, k, v, block_mask=mask)

    else:
        tokens = torch.arange(n)
        mask = rule(None, None, tokens[:, None], tokens)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def function() -> Any:
        return attend(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)

    def forward() -> Any:
        with torch.no_grad():
            return function()

    def step() -> Any:
        y = function()
        return y, *torch.autograd.grad(y, leaves, dy)

    results = step() if case["mode"] == "gradient" else (forward(),)
    named = zip(("y", "q", "k", "v"), results, strict=False)
    np.savez(case["outputs"], **{name: x.detach().numpy() for name, x in named})
    return forward, step, 0


def _mixer(case: dict[str, Any]) -> Callable[[Any], Any]:
    """`torch.nn.MultiheadAttention` by its function, so that gradients are of the weights given."""
    import torch
    from torch.nn.functional import multi_head_attention_forward

    _, n, c, heads = case["shape"]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(n) if case["causal"] else None

    def function(a: dict[str, Any]) -> Any:
        x = a["x"].transpose(0, 1)
        joined = torch.cat([a[name].T for name in ("query", "key", "value")])
        y, _ = multi_head_attention_forward(
            *(x, x, x, c, heads, joined, None, None, None, False, 0.0, a["out"].T, None),
            need_weights=False,
            attn_mask=mask,
            is_causal=case["causal"],
        )
        return y.transpose(0, 1)

    return function


def _depthwise(case: dict[str, Any]) -> Callable[[Any], Any]:
    from torch.nn.functional import conv2d

    def function(a: dict[str, Any]) -> Any:
        x, kernel = a["x"].permute(0, 3, 1, 2), a["kernel"].permute(2, 0, 1)[:, None]
        return conv2d(x, kernel, padding=1, groups=case["shape"][-1]).permute(0, 2, 3, 1)

    return function


def _model(case: dict[str, Any], x: Any) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    import numpy as np
    import torch

    if case["kind"] == "language":
        model, labels = _gpt2(int(case["vocabulary"]), case["shape"]), x.roll(-1, 1)
    else:
        import timm

        model = timm.create_model(case["peer"], pretrained=False, num_classes=1000)
        x, labels = x.permute(0, 3, 1, 2).contiguous(), torch.arange(x.shape[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    np.savez(case["outputs"])
    return forward, step, sum(parameter.numel() for parameter in model.parameters())


def _gpt2(vocabulary: int, shape: list[int]) -> Any:
    """GPT-2 of PyTorch's own modules and its fused attention: token ids (B, N) to logits (B, N, vocabulary)."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    _, length, features, depth, heads = shape

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
            self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
            wide = nn.Linear(features, 4 * features)
            self.mlp = nn.Sequential(wide, nn.GELU(approximate="tanh"), nn.Linear(4 * features, features))

        def forward(self, x: Any) -> Any:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, features // heads))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, features), nn.Embedding(length, features)
            self.layers, self.norm = nn.Sequential(*(Layer() for _ in range(depth))), nn.LayerNorm(features)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            return self.norm(self.layers(x)) @ self.tokens.weight.T

    return Model()


def main() -> None:
    """Answers requests until the other process closes the pipe."""
    here = [name for name in ("torch", "timm") if importlib.util.find_spec(name)]
    calls: dict[str, Callable[[], Any]] = {}
    if "torch" in here:
        import torch

        torch.set_num_threads(int(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if request["what"] == "versions":
            answer = {name: importlib.metadata.version(name) for name in here}
        elif request["what"] == "build":
            if request["kind"] == "model" and "timm" not in here:
                answer = {"reason": "timm is not installed"}
            else:
                try:
                    calls["forward"], calls["step"], count = build(request)
                    answer = {"parameters": count}
                except Exception as error:  # a package that is broken there is a line of the table
                    answer = {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        else:
            answer = {"seconds": median_seconds(calls[request["what"]], request["seconds"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
