"""PyTorch's attention with each of its backends, forward and backward: prints a line of JSON per time as it is measured.

    python3 benches/attention_torch.py B/16,512,197,12,64 H/14,392,257,16,80

A shape is NAME,IMAGES,TOKENS,HEADS,HEAD SIZE. Queries, keys and values are views of one `[B, T, 3, H, Dh]`, as in a ViT, in bf16. A
backward ends with their three gradients, before autograd gathers them. Times are medians of rounds, by the GPU's own events. Operands
of the named models are larger than any cache. A backend that refuses a shape says why.
"""
import argparse
import json
import statistics
import sys
import time

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


def seconds_of(torch, device, run, repeats):
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def median_ms(torch, device, run, args):
    run()
    once = seconds_of(torch, device, run, 2)
    repeats = max(1, min(1000, round(args.seconds / max(once, 1e-6))))
    return 1e3 * statistics.median(seconds_of(torch, device, run, repeats) for _ in range(args.rounds))


def measure(torch, device, shape, backend, args):
    """(direction, ms), one after the other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    _, images, tokens, heads, head_size = shape
    qkv = torch.randn(images, tokens, 3, heads, head_size, device=device, dtype=torch.bfloat16)
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
        with torch.no_grad():
            yield "forward", median_ms(torch, device, lambda: scaled_dot_product_attention(q, k, v), args)
        o = scaled_dot_product_attention(q, k, v)
        d_o = torch.randn_like(o)
        yield "backward", median_ms(torch, device, lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True), args)


def shape(text):
    name, *sizes = text.split(",")
    images, tokens, heads, head_size = map(int, sizes)
    return name, images, tokens, heads, head_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", type=shape)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.05)
    args = parser.parse_args()
    import torch

    device = torch.device(args.device)
    torch.manual_seed(0)
    for at in args.shapes:
        for backend in BACKENDS:
            about = {"engine": f"torch {torch.__version__}", "backend": backend, "model": at[0]}
            try:
                for direction, ms in measure(torch, device, at, backend, args):
                    print(json.dumps({**about, "direction": direction, "ms": ms}), flush=True)
            except RuntimeError as why:
                print(json.dumps({**about, "refused": str(why).splitlines()[0][:200]}), flush=True)
                print(f"{at[0]}, {backend}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
