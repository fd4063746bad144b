"""How long the kernels of a training step should take on a GPU: the model behind `scripts/predict-gpu`.

A step is its kernels, one after the other, as a run launches them. Each takes the longest of its limits, at an assumed share of the
limit: FLOPs at the rate of a large product, bytes at the bandwidth of a large copy, warp instructions at what the schedulers issue.
Every assumption has three values, so a step has three times; low means slow. This project measured nothing here on a GPU: observed
values were published by others or measured with other programs.
"""
import functools
import math
import os
import re
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLASSES = 1000
Model = namedtuple("Model", "image patch width depth heads batch")
MODELS = {
    "Ti/16": Model(224, 16, 192, 12, 3, 1024),
    "S/16": Model(224, 16, 384, 12, 6, 1024),
    "B/16": Model(224, 16, 768, 12, 12, 512),
    "L/16": Model(224, 16, 1024, 24, 16, 256),
    "H/14": Model(224, 14, 1280, 32, 16, 128),
    "B/16@384": Model(384, 16, 768, 12, 12, 128),
}

# FLOP/s of a bf16 product of 8192 in each direction, bytes/s of a copy of 1 GiB; multiprocessors, their clock, clocks of one mma.sync
# on one of them; FLOP/s of the data sheet. Products and copies were observed on one H200 and one H100 SXM (random data; zeros run 13 %
# faster), the A100's are usual figures. mma.sync: 62 % of Hopper's peak, all of Ampere's.
Card = namedtuple("Card", "product copy multiprocessors clock mma_clocks data_sheet")
CARDS = {
    "H100": Card(790e12, 3.0e12, 132, 1.755e9, 1.6, 989e12),
    "H200": Card(790e12, 4.3e12, 132, 1.755e9, 1.6, 989e12),
    "A100": Card(270e12, 1.75e12, 108, 1.41e9, 2.0, 312e12),
}

CASES = ("low", "likely", "high")
Assumed = namedtuple("Assumed", "product epilogue weight_gradient short_k copy issue exposed column_sums gap least")
# Each value three times: low, likely, high. docs/performance.md has a table of their effects.
ASSUMED = {
    # Shares of a large product: plain, with a GELU that reads or writes a second matrix, of weights; k at which half is reached.
    "low": Assumed(0.86, 0.80, 0.84, 200, 0.78, 0.60, 1.5, True, 2.0e-6, 4.0e-6),
    "likely": Assumed(0.96, 0.93, 0.92, 160, 0.85, 0.74, 1.0, False, 1.5e-6, 2.5e-6),
    "high": Assumed(1.00, 0.99, 0.95, 120, 0.90, 0.80, 0.5, False, 1.2e-6, 2.0e-6),
}
# Rows and columns of a product's tile, and its share of the rate: cuBLASLt's usual ones on Hopper.
TILES = [(128, 256, 1.0), (256, 128, 1.0), (192, 128, 0.97), (128, 192, 0.97), (128, 128, 0.92), (64, 128, 0.75)]
CLOCK_RISE = 1.12  # idle multiprocessors leave power to the others: the same product on zeros ran 13 % faster
SPLITS, SPLIT_K = 32, 512  # most splits of k, least k of one
WORKSPACE = 256 << 20  # what the search gives cuBLASLt: f32 partial sums of all splits have to fit

# Tensor-core attention by width of the tile: products, rows that stream past at a time, rows of a warp, warps, blocks of threads per
# multiprocessor (kernels/attention_*.cu, docs/kernel-table.md). Then the counts for heads of 65 to 1,025 tokens: warp
# instructions per mma, per warp and block of rows, per strip (scripts/attention-counts, on nvcc 13.0's PTX: within 0.2 % at 197, 257 and
# 577 tokens, 2 % from 128 tokens on with few exceptions, 5 % at 65 and 96), and passes over shared memory per mma and per strip
# (stand-in GPU: never too few, at most 4 % too many). At 197 tokens of 64 values: 33,718 instructions forward, 68,476 backward.
Attention = namedtuple("Attention", "products block strip warps resident per_mma per_block per_strip passes_mma passes_strip")
ATTENTION = {
    ("attention_forward", 32): Attention(2, 64, 32, 4, 2, 10.46, 155, 602, 1.51, 65),
    ("attention_forward", 64): Attention(2, 64, 32, 4, 2, 6.63, 245, 944, 1.55, 135),
    ("attention_forward", 80): Attention(2, 32, 32, 4, 2, 7.15, 200, 1127, 1.80, 160),
    ("attention_forward", 128): Attention(2, 32, 32, 4, 2, 5.73, 268, 1700, 1.76, 240),
    ("attention_backward_head", 64): Attention(5, 32, 32, 8, 1, 5.27, 548, 0, 2.20, 325),
    ("attention_backward_queries", 32): Attention(3, 32, 32, 4, 2, 7.87, 151, 1094, 1.84, 85),
    ("attention_backward_queries", 64): Attention(3, 32, 32, 4, 2, 5.05, 228, 1744, 1.81, 225),
    ("attention_backward_queries", 80): Attention(3, 32, 32, 4, 2, 4.51, 313, 2109, 1.87, 220),
    ("attention_backward_queries", 128): Attention(3, 16, 16, 8, 1, 5.95, 132, 1724, 3.51, 145),
    ("attention_backward_keys", 32): Attention(4, 32, 32, 4, 2, 6.78, 118, 807, 1.89, 115),
    ("attention_backward_keys", 64): Attention(4, 32, 32, 4, 2, 4.51, 172, 1443, 1.73, 295),
    ("attention_backward_keys", 80): Attention(4, 16, 32, 4, 2, 4.88, 148, 1814, 2.25, 260),
    ("attention_backward_keys", 128): Attention(4, 16, 16, 8, 1, 5.41, 105, 1436, 3.26, 210),
}
HEAD_TOKENS = 256  # most tokens of a head that one block owns, backward


# ---- What a kernel moves and issues ----


class Sizes:
    """The sizes that bytes depend on."""

    def __init__(self, model, residual="bf16", multiprocessors=132):
        self.d, self.batch, self.heads, self.depth = model.width, model.batch, model.heads, model.depth
        self.image, self.run = model.image, 3 * model.patch**2
        self.tokens = (model.image // model.patch) ** 2 + 1
        self.rows = self.batch * self.tokens
        self.head = self.d // self.heads
        self.multiprocessors = multiprocessors
        # An activation and the residual stream; statistics of a LayerNorm; lse of attention; a row of D for each sample.
        self.x = 2 * self.rows * self.d
        self.stream = {"bf16": 2, "f32": 4}[residual]
        self.r = self.stream * self.rows * self.d
        self.statistics = 8 * self.rows
        self.lse = 4 * self.batch * self.heads * self.tokens
        self.sample = 2 * self.batch * self.d
        # Partial sums of a LayerNorm's backward (γ, β, and the bias of the layer before it), of embed's over slices of the batch.
        self.norm_blocks = min(math.ceil(self.rows / 6), multiprocessors * (3 if self.d <= 256 else 2 if self.d <= 768 else 1))
        threads = math.ceil(self.tokens * self.d / 8)
        slices = min(math.ceil(multiprocessors * 1024 / threads), (16 << 20) // (4 * self.tokens * self.d))
        self.slices = max(1, min(slices, self.batch))
        self.params = self.depth * (12 * self.d**2 + 13 * self.d) + (self.run + self.tokens + 4) * self.d + CLASSES * (self.d + 1)


# Bytes of one launch: every operand read once, every result written once. docs/kernel-table.md compares them with counts.
BYTES = {
    "patchify_u8": lambda s: 3 * s.batch * s.image**2 + 2 * s.rows * s.run,
    "embed": lambda s: 2 * s.r + 4 * (s.tokens + 2) * s.d,
    "layernorm": lambda s: s.r + s.x + s.statistics + 8 * s.d,
    "attention_forward": lambda s: 4 * s.x + s.lse,
    "query_attention": lambda s: 2 * s.x + 2 * s.sample + s.lse,
    "pool": lambda s: s.stream * s.sample,
    "loss_softmax": lambda s: 4 * s.batch * CLASSES + 20 * s.batch,
    "pool_backward": lambda s: s.stream * s.sample // 2 + s.r,
    # With an f32 stream, products read a bf16 copy.
    "layernorm_backward": lambda s: 3 * s.r + (2 if s.stream == 4 else 1) * s.x + s.statistics + 4 * s.d + 12 * s.norm_blocks * s.d,
    # dqkv's bias is summed from the rows of each head's block, or of each of its tiles of keys.
    "attention_backward_head": lambda s: 8 * s.x + s.lse + 12 * s.batch * s.d,
    "attention_backward_queries": lambda s: 6 * s.x + 2 * s.lse + 4 * s.batch * s.d * tiles_of_keys(s),
    "attention_backward_keys": lambda s: 6 * s.x + 2 * s.lse + 8 * s.batch * s.d * tiles_of_keys(s),
    "query_attention_backward": lambda s: 4 * s.x + 3 * s.sample + s.lse,
    "column_sums": lambda s: 8 * s.rows * s.d + 16 * s.d * math.ceil(4 * s.multiprocessors / math.ceil(4 * s.d / 256)),
    "embed_backward": lambda s: s.r + 4 * s.tokens * s.d * s.slices,
    "embed_gradients": lambda s: 4 * s.tokens * s.d * (s.slices + 2) + 4 * s.d,
    "gradient_squares": lambda s: 4 * s.params + 64 * s.multiprocessors,
    "update_adam": lambda s: 30 * s.params,
}


def tiles_of_keys(s):
    a = ATTENTION["attention_backward_keys", tile_width(s.head)]
    return math.ceil(math.ceil(s.tokens / a.strip) / a.warps)


def tile_width(head):
    return min(width for _, width in ATTENTION if width >= head)


def counts(kernel, tokens, head):
    """(mma, warp instructions, passes over shared memory) of one head."""
    a = ATTENTION[kernel, tile_width(head)]
    strips = math.ceil(tokens / a.strip)
    blocks, rest = math.ceil(tokens / a.block), tokens % a.block
    # The rest of the last block is computed as 16 rows if it is at most that.
    columns = blocks * a.block - (a.block - 16 if 0 < rest <= 16 else 0)
    mma = (strips * a.strip // 16) * (columns // 8) * (tile_width(head) // 16)
    if kernel == "attention_backward_head":
        # dQ, the fifth product, has as many queries as keys, and no strips.
        mma = 4 * mma + math.ceil(tokens / 16) ** 2 * (tile_width(head) // 8)
    else:
        mma *= a.products
    warps = a.warps * (1 if kernel == "attention_backward_head" else math.ceil(strips / a.warps))
    issued = a.per_mma * mma + a.per_block * warps * blocks + a.per_strip * strips
    return mma, issued, a.passes_mma * mma + a.passes_strip * strips


@functools.cache
def counted():
    """Kernel, without its instance → the largest ratio of counted to least bytes in docs/kernel-table.md."""
    ratios = {}
    for _, name, least_read, read, least_written, written in table():
        ratios[name] = max(ratios.get(name, 1.0), (read + written) / max(least_read + least_written, 1))
    return ratios


def table():
    """Operation with its shape, kernel without its instance, bytes read (least, counted) and written (least, counted)."""
    row = re.compile(r"^\| ([^|]*) \| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| [\d.]* \| ([\d,]+) \| ([\d,]+) \|", re.M)
    with open(os.path.join(ROOT, "docs", "kernel-table.md")) as file:
        for operation, name, *cells in row.findall(file.read()):
            yield operation, re.sub(r"_(bf16|f32)\w*$", "", name), *(int(cell.replace(",", "")) for cell in cells)


def flops(model):
    """FLOPs of a forward pass per image: matrix products only, even if some are skipped."""
    t, d = (model.image // model.patch) ** 2 + 1, model.width
    return 2 * ((t - 1) * 3 * model.patch**2 * d + model.depth * (12 * t * d * d + 2 * t * t * d) + d * CLASSES)


# ---- How long it takes ----

Kernel = namedtuple("Kernel", "name launches flops bytes seconds limit")


class Kernels:
    """The kernels of a pass on one GPU, under one case of the assumptions, or under others."""

    def __init__(self, model, card, case, residual="bf16"):
        self.model, self.card, self.case = model, card, ASSUMED.get(case, case)
        self.sizes = Sizes(model, residual, card.multiprocessors)
        self.list, self.ratios = [], counted()

    def add(self, name, launches, flops, bytes_, times):
        """`times`: seconds by each limit of the kernel."""
        times = {"launch": self.case.least, **times}
        limit = max(times, key=times.get)
        self.list.append(Kernel(name, launches, flops, bytes_, times[limit] + self.case.gap, limit))

    def moved(self, bytes_):
        return bytes_ / (self.case.copy * self.card.copy)

    def own(self, name, launches=1, bytes_=None, of=""):
        """A kernel limited by memory: bytes by its formula, times the counted ratio. `of`: distinguishes it from others."""
        bytes_ = (BYTES[name](self.sizes) if bytes_ is None else bytes_) * self.ratios.get(name, 1.0)
        self.add(name + of, launches, 0.0, bytes_, {"HBM": self.moved(bytes_)})

    def product(self, name, m, n, k, bytes_, launches=1, kind="product", and_then=0.0):
        """`[n, k] × [k, m]`. `and_then`: bytes of a kernel that must follow."""
        flops, card, case = 2.0 * m * n * k, self.card, self.case
        rate = card.product * getattr(case, kind)
        best, partials = math.inf, 0
        for tile_m, tile_n, share in TILES:
            tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n)
            for split in range(1, SPLITS + 1):
                depth, sums = k / split, 8 * split * m * n if split > 1 else 0  # f32, written and read
                if split > 1 and (depth < SPLIT_K or sums > 2 * WORKSPACE):
                    break
                waves = tiles * split / card.multiprocessors
                busy = min(1.0, CLOCK_RISE * waves / math.ceil(waves)) * share * depth / (depth + case.short_k)
                seconds = 2.0 * tiles * tile_m * tile_n * k / (rate * busy) + self.moved(sums)
                if seconds < best:
                    best, partials = seconds, sums
        bytes_ += partials
        times = {"product": best, "HBM": self.moved(bytes_)}
        if and_then:
            times = {limit: seconds + self.moved(and_then) + case.gap for limit, seconds in times.items()}
        self.add(name, launches, flops, bytes_ + and_then, times)

    def attention(self, name, launches):
        """Blocks of threads run one after the other on a multiprocessor; if it holds two, one loads while the other computes."""
        s, card, case = self.sizes, self.card, self.case
        a = ATTENTION[name, tile_width(s.head)]
        tiles = 1 if name == "attention_backward_head" else math.ceil(math.ceil(s.tokens / a.strip) / a.warps)
        mma, issued, passes = (count / tiles for count in counts(name, s.tokens, s.head))
        blocks = math.ceil(s.batch * s.heads * tiles / card.multiprocessors)
        bytes_ = BYTES[name](s) * self.ratios.get(name, 1.0)
        # A block that is alone on its multiprocessor waits for keys, values and its first queries.
        alone = s.batch * s.heads * (2 * s.tokens + 2 * a.block) * 2 * s.head if a.resident == 1 else 0
        exposed = case.exposed * self.moved(alone)
        times = {
            "instructions": blocks * issued / (4 * case.issue * card.clock) + exposed,
            "shared memory": blocks * passes / (case.issue * card.clock) + exposed,
            "mma": blocks * mma * card.mma_clocks / card.clock + exposed,
            "HBM": self.moved(bytes_),
        }
        self.add(name, launches, a.products * 2.0 * s.batch * s.tokens**2 * s.d, bytes_, times)

    def seconds(self):
        return sum(kernel.launches * kernel.seconds for kernel in self.list)

    def img_per_s(self):
        return self.model.batch / self.seconds()


class Step(Kernels):
    """The launches of a run: `src/vit/forward.rs` and `backward.rs`, the class token, AdamW with clipping."""

    def __init__(self, model, card, case, pruned=False, residual="bf16", infer=False):
        super().__init__(model, card, case, residual)
        self.full = model.depth - pruned
        self.pruned, self.infer = pruned, infer
        self.forward()
        if not infer:
            self.backward()

    def layers(self):
        """A block's dense layers: name, outputs, inputs, bytes of results and of what the epilogue moves beside inputs and weights."""
        s, d = self.sizes, self.sizes.d
        aux = 0 if self.infer else 4 * s.x  # the pre-activation, which a backward reads
        return [("qkv", 3 * d, d, 3 * s.x), ("proj", d, d, 2 * s.r), ("fc1", 4 * d, d, 4 * s.x + aux), ("fc2", d, 4 * d, 2 * s.r)]

    def forward(self):
        s, d, full = self.sizes, self.sizes.d, self.full
        self.own("patchify_u8")
        self.product("patch_embed", d, s.rows, s.run, 2 * s.rows * s.run + s.r + 2 * d * s.run)
        self.own("embed")
        # In a pruned last block, the first LayerNorm has all tokens.
        self.own("layernorm", 2 * full + self.pruned)
        for name, out, inputs, epilogue in self.layers():
            kind = "epilogue" if name == "fc1" else "product"
            self.product(name, out, s.rows, inputs, 2 * s.rows * inputs + 2 * out * inputs + epilogue, full, kind)
            if name == "qkv":
                self.attention("attention_forward", full)
        if self.pruned:
            self.product("last block, kv", 2 * d, s.rows, d, 3 * s.x + 4 * d * d)
            self.own("query_attention")
            for name, out, inputs in [("q", d, d), ("proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d)]:
                self.of_samples(f"last block, {name}", out, s.batch, inputs)
        self.own("pool")
        self.own("layernorm", 1 + self.pruned, 6 * s.sample, ", class token")
        self.of_samples("head", CLASSES, s.batch, d)
        # Small kernels: begin and end of a report, scaling, the update's factors, copies of biases.
        self.own("report, scale", 2 if self.infer else 7, 0)

    def of_samples(self, name, m, n, k):
        """A product of matrices that have a row per sample, or are weights."""
        self.product(name, m, n, k, 2 * (m * n + m * k + n * k))

    def backward(self):
        s, d, full = self.sizes, self.sizes.d, self.full
        partials = 12 * s.norm_blocks * d
        self.own("loss_softmax")
        self.of_samples("head, input gradient", d, s.batch, CLASSES)
        self.of_samples("head, weight gradient", d, CLASSES, s.batch)
        self.own("layernorm_backward", 1 + self.pruned, 10 * s.sample, ", class token")
        self.own("pool_backward")
        for name, out, inputs, _ in reversed(self.layers()):
            operands, w = 2 * s.rows * (inputs + out), 2 * out * inputs
            aux = 8 * s.rows * d if name == "fc2" else 0
            kind = "epilogue" if name == "fc2" else "product"
            if name == "qkv":
                self.attention_backward()
            self.product(f"{name}, input gradient", inputs, s.rows, out, operands + w + aux, full, kind)
            # Biases: LayerNorm's backward sums those of fc2 and proj, attention's sums qkv's. fc1's is fused, or a separate pass.
            sums = BYTES["column_sums"](s) if name == "fc1" and self.case.column_sums else 0
            self.product(f"{name}, weight gradient", inputs, out, s.rows, operands + 2 * w, full, "weight_gradient", sums)
        self.own("layernorm_backward", 2 * full + self.pruned)
        self.own("sum_partials", 3 * full + 3 * self.pruned + 1, partials)
        if self.pruned:
            self.product("last block, kv, input gradient", d, s.rows, 2 * d, 3 * s.x + 4 * d * d)
            self.product("last block, kv, weight gradient", d, 2 * d, s.rows, 3 * s.x + 8 * d * d, 1, "weight_gradient")
            self.own("query_attention_backward")
            for name, out, inputs in [("q", d, d), ("proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d)]:
                self.of_samples(f"last block, {name}, input gradient", inputs, s.batch, out)
                self.of_samples(f"last block, {name}, weight gradient", inputs, out, s.batch)
        self.own("embed_backward")
        self.own("embed_gradients")
        self.own("sum_partials", 1, 4 * s.tokens * d, ", positions")
        operands = s.x + 2 * s.rows * s.run
        self.product("patch_embed, weight gradient", s.run, d, s.rows, operands + 4 * d * s.run, 1, "weight_gradient")
        self.own("gradient_squares")
        self.own("update_adam")

    def attention_backward(self):
        if self.sizes.tokens <= HEAD_TOKENS and tile_width(self.sizes.head) == 64:
            self.attention("attention_backward_head", self.full)
        else:
            self.attention("attention_backward_queries", self.full)
            self.attention("attention_backward_keys", self.full)


# FLOP/s of cuDNN's attention at about 200 tokens, forward and backward, on a GPU with Hopper's 790: published at 512 tokens are 335
# and 266; with tiles of 128 rows that leaves 198 and 157 at 197. Low is FlashAttention-2, PyTorch's default.
CUDNN = {"low": (180e12, 120e12), "likely": (230e12, 170e12), "high": (290e12, 220e12)}


class Compiled(Kernels):
    """The same step by `torch.compile` under autocast, with the attention of cuDNN: a count of what PyTorch does, not a profile.

    The residual stream and what LayerNorm reads are f32; GELU, its derivative and bias gradients are passes of their own; the
    gradients of Q, K and V are put together; weights are cast in each step. Products are those of the same library.
    """

    def __init__(self, model, card, case):
        super().__init__(model, card, case)
        s, d, depth = self.sizes, self.sizes.d, model.depth
        x, w = s.x, 2 * d * d
        self.own("pixels, layout", 2, 7 * s.batch * s.image**2 / 2 * 3)
        self.product("patch_embed", d, s.rows, s.run, 2 * s.rows * s.run + x + 2 * d * s.run)
        self.own("positions, class token", 1, 4 * x)
        # The sum of stream and branch, and its norm: x of the branch, f32 in and out, y.
        self.own("add, layernorm", 2 * depth, 6 * x + s.statistics)
        self.own("layernorm", 1, 3 * x)
        layers = [("qkv", 3 * d, d), ("proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d)]
        for name, out, inputs in layers:
            operands, weight = 2 * s.rows * (inputs + out), 2 * inputs * out
            self.product(name, out, s.rows, inputs, operands + weight, depth)
            self.product(f"{name}, input gradient", inputs, s.rows, out, operands + weight, depth)
            self.product(f"{name}, weight gradient", inputs, out, s.rows, operands + weight, depth, "weight_gradient")
        one = 2.0 * s.batch * s.tokens**2 * d
        for name, products, rate, bytes_ in zip(("forward", "backward"), (2, 5), CUDNN[case], (4 * x, 8 * x)):
            seconds = products * one / (rate * card.product / 790e12)
            self.add(f"attention, {name}", depth, products * one, bytes_, {"product": seconds, "HBM": self.moved(bytes_)})
        self.own("attention, before and after", 2 * depth, 9 * x / 2)
        self.own("put together q, k, v", depth, 6 * x)
        self.own("gelu", depth, 8 * x)
        self.own("gelu_backward", depth, 12 * x)
        self.own("bias gradients", 4 * depth, 9 * x / 4)
        self.own("layernorm_backward", 2 * depth + 1, 7 * x + s.statistics)
        self.own("positions, gradient", 1, 2 * x)
        self.product("patch_embed, weight gradient", s.run, d, s.rows, x + 2 * s.rows * s.run, 1, "weight_gradient")
        self.own("head, loss", 8, s.sample)
        # Weights cast 6, gradients read for the norm 4, scaled 8, AdamW 28.
        self.own("update", 4, 46 * s.params / 4)
