//! Handles into the flat arenas, and the plan that says how big each arena is.
//!
//! The plan is made once from (model, batch, precision). The parameter layout gives the parameter, gradient
//! and optimiser arenas; the model gives the activations. On a device with its own memory, the slots give the
//! space for batches, and the optimiser's segments give the tables of an update. `vitrum plan` prints the
//! plan, the backend allocates exactly that, and nothing else is allocated.

use std::fmt;

use super::SlotLayout;

/// The flat buffers of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arena {
    /// f32 master weights.
    Params,
    /// f32 gradients of the trained tensors.
    Grads,
    /// First moments; mirrors `Grads`.
    Moment1,
    /// Second moments; mirrors `Grads`, or Adafactor's statistics.
    Moment2,
    /// Exponential moving average of the weights; mirrors `Params`.
    Ema,
    /// Everything that a forward pass keeps and a backward pass needs.
    Activations,
    /// bf16 copy of `Params` with the same element offsets; only where matrix products read bf16.
    Working,
    /// Partial sums and scratch of a device's operations, and the params that pass each step's values to its
    /// kernels.
    Workspace,
    /// Space for two batches, where operations do not read the slot itself: one is filled while the other is
    /// read.
    Batches,
    /// Tables and scratch of a device's update.
    Update,
    /// Sums of gradients that wait for others, and what ranks send each other. Empty for one rank without
    /// chunks.
    Exchange,
}

impl Arena {
    /// The number of arenas.
    pub const COUNT: usize = 11;
    /// The arenas whose contents persist between operations and cannot be derived from anything else.
    pub const ALL: [Arena; 6] =
        [Arena::Params, Arena::Grads, Arena::Moment1, Arena::Moment2, Arena::Ema, Arena::Activations];
}

/// The type of a matrix's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of a single.
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

/// A row-major matrix somewhere in an arena: a handle, not memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mat {
    /// The memory that it lies in.
    pub arena: Arena,
    /// Byte offset of the first element; a multiple of 256 where a tensor starts.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Values per row.
    pub cols: usize,
    /// Elements from one row to the next; `cols <= ld`.
    pub ld: usize,
    /// Type of the elements.
    pub dtype: Dtype,
}

impl Mat {
    /// Bytes from the first element to the end of the last row.
    pub fn span_bytes(&self) -> usize {
        if self.rows == 0 { 0 } else { ((self.rows - 1) * self.ld + self.cols) * self.dtype.bytes() }
    }

    /// The same memory with `rows × cols` viewed as `rows·n × cols/n` (or the other way). Needs `ld == cols`.
    pub fn reshape(self, rows: usize, cols: usize) -> Mat {
        assert_eq!(self.ld, self.cols, "only a dense matrix can be reshaped");
        assert_eq!(self.rows * self.cols, rows * cols, "reshape keeps the number of elements");
        Mat { rows, cols, ld: cols, ..self }
    }

    /// The first `rows` rows.
    pub fn first_rows(self, rows: usize) -> Mat {
        self.row_range(0, rows)
    }

    /// `count` rows, starting at `first`.
    pub fn row_range(self, first: usize, count: usize) -> Mat {
        assert!(first + count <= self.rows, "rows {first}..{} of {}", first + count, self.rows);
        Mat { offset: self.offset + first * self.ld * self.dtype.bytes(), rows: count, ..self }
    }

    /// `count` columns, starting at `first`.
    pub fn column_range(self, first: usize, count: usize) -> Mat {
        assert!(first + count <= self.cols, "columns {first}..{} of {}", first + count, self.cols);
        Mat { offset: self.offset + first * self.dtype.bytes(), cols: count, ..self }
    }

    /// Row 0 of every `group` rows: the class tokens of `[B·T, ..]`, with `group` = T.
    pub fn every_row(self, group: usize) -> Mat {
        assert!(self.rows.is_multiple_of(group), "{} rows in groups of {group}", self.rows);
        Mat { rows: self.rows / group, ld: self.ld * group, ..self }
    }
}

impl fmt::Display for Mat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{} [{}, {}] ld {}", self.arena, self.offset, self.rows, self.cols, self.ld)
    }
}

/// Activations that the backward pass recomputes instead of keeping them. No level changes a bit of the
/// gradients, with one exception: a GPU's fused GELU rounds differently from our GELU kernel.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Recompute {
    /// Nothing: every activation is kept.
    #[default]
    #[serde(rename = "none")]
    None,
    /// LayerNorm outputs and the MLP's activation: 12 of 32 widths per token, for a few per cent of time.
    #[serde(rename = "ln+gelu")]
    LnGelu,
    /// Everything of a block except its input: costs one more forward pass.
    #[serde(rename = "block")]
    Block,
}

/// How a device stores data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Type of activations and of their gradients. Statistics, metrics, parameters and moments are f32 everywhere.
    pub activations: Dtype,
    /// Type of the residual stream and its gradient: that of activations, or f32.
    pub residual: Dtype,
    /// Rows of activations are padded to a multiple of this many elements.
    pub row_align: usize,
    /// Bytes of [`Arena::Workspace`]; 0 where operations work in main memory.
    pub workspace: usize,
    /// What is recomputed instead of kept. The run's choice, not the device's.
    pub recompute: Recompute,
}

impl Storage {
    /// Dense f32 in main memory.
    pub const CPU: Storage = Storage {
        activations: Dtype::F32,
        residual: Dtype::F32,
        row_align: 1,
        workspace: 0,
        recompute: Recompute::None,
    };

    /// Whether the device has its own memory: batches are copied there, and so are the update's tables.
    pub fn has_device_memory(&self) -> bool {
        self.workspace > 0
    }

    /// Whether matrix products read a bf16 copy of the weights.
    pub fn has_working_copy(&self) -> bool {
        self.activations == Dtype::Bf16
    }
}

/// Tensors start at multiples of this many bytes (cuBLASLt's heuristics assume 256).
pub const TENSOR_ALIGN: usize = 256;
/// Rows of parameters are padded to a multiple of this many elements (16-byte accesses in bf16).
pub const ROW_ALIGN: usize = 8;

/// One line of the memory table.
#[derive(Clone, Debug)]
pub struct PlanEntry {
    /// What lies there, such as `block 0 qkv`.
    pub name: String,
    /// Size, with padding.
    pub bytes: usize,
}

/// Sizes of all arenas, and what lies in the activation arena.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    storage: Storage,
    sizes: [usize; Arena::COUNT],
    /// In main memory.
    snapshot: usize,
    /// The contents of the activation arena, in order of allocation.
    pub activations: Vec<PlanEntry>,
}

impl MemoryPlan {
    /// A plan of nothing but the device's workspace.
    pub fn new(storage: Storage) -> Self {
        let mut plan = Self { storage, sizes: [0; Arena::COUNT], snapshot: 0, activations: Vec::new() };
        plan.sizes[Arena::Workspace as usize] = storage.workspace;
        plan
    }

    /// How the device stores activations.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Sets the size of an arena that is laid out elsewhere (parameters, gradients, moments).
    pub fn set_bytes(&mut self, arena: Arena, bytes: usize) {
        self.sizes[arena as usize] = bytes;
        if arena == Arena::Params && self.storage.has_working_copy() {
            self.sizes[Arena::Working as usize] = bytes / 2;
        }
    }

    /// Reserves space for the slots that will be bound; `layout` is the largest.
    pub fn set_batch(&mut self, layout: SlotLayout) {
        if self.storage.has_device_memory() {
            self.sizes[Arena::Batches as usize] = 2 * layout.bytes().next_multiple_of(TENSOR_ALIGN);
        }
    }

    /// Size of one arena.
    pub fn bytes(&self, arena: Arena) -> usize {
        self.sizes[arena as usize]
    }

    /// Bytes of the arena with this index.
    pub fn bytes_at(&self, index: usize) -> usize {
        self.sizes[index]
    }

    /// Size of all arenas.
    pub fn total_bytes(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Bytes of main memory for the copy that a checkpoint is written from.
    pub fn snapshot_bytes(&self) -> usize {
        self.snapshot
    }

    /// Sets them.
    pub fn set_snapshot_bytes(&mut self, bytes: usize) {
        self.snapshot = bytes;
    }

    /// A matrix in the activation arena, with the device's type and padding.
    pub fn activation(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.padded(name.into(), rows, cols, self.storage.activations)
    }

    /// The same for a part of the residual stream or of its gradient.
    pub fn stream(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.padded(name.into(), rows, cols, self.storage.residual)
    }

    /// A dense f32 matrix in the activation arena: statistics and metrics.
    pub fn statistics(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.place(name.into(), rows, cols, Dtype::F32)
    }

    fn padded(&mut self, name: String, rows: usize, cols: usize, dtype: Dtype) -> Mat {
        let ld = if rows == 1 { cols } else { cols.next_multiple_of(self.storage.row_align) };
        Mat { cols, ..self.place(name, rows, ld, dtype) }
    }

    fn place(&mut self, name: String, rows: usize, cols: usize, dtype: Dtype) -> Mat {
        let offset = self.sizes[Arena::Activations as usize];
        let bytes = (rows * cols * dtype.bytes()).next_multiple_of(TENSOR_ALIGN);
        self.sizes[Arena::Activations as usize] = offset + bytes;
        self.activations.push(PlanEntry { name, bytes });
        Mat { arena: Arena::Activations, offset, rows, cols, ld: cols, dtype }
    }
}
