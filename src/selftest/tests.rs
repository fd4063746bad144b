//! The cases pass on the CPU, and fail on a device with a single fault.

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::compute::{Compute, Isa};
use crate::backend::{
    Arena, Body, Dtype, Group, InputGrad, Join, Mat, MemoryPlan, Micro, Op, Slot, SlotLayout, StepKeys,
    StepReport, Storage, Update, Write,
};

fn cpu(isa: Isa, threads: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(CpuBackend::with(Compute::new(isa, threads)?)))
}

#[test]
fn the_cpu_passes_with_every_instruction_set_and_any_threads() {
    for isa in Isa::available() {
        for threads in [1, 3] {
            let cases = run(&|| cpu(isa, threads), None);
            let device = format!("{} with {threads} threads", isa.name());
            let report = Report { device, seconds: 0.0, cases };
            assert!(report.verdict().is_ok(), "{}", report.table());
        }
    }
}

#[test]
fn a_table_names_what_failed_and_how() {
    let result = |operation: &'static str, error, note: &str| CaseResult {
        operation: operation.into(),
        case: "[5, 7]".into(),
        error,
        tolerance: 1e-6,
        passed: error <= 1e-6,
        note: note.into(),
    };
    let cases =
        vec![result("pool", 1e-8, "y"), result("scale", 2e-8, "x"), result("scale", 3e-2, "x: too far")];
    let report = Report { device: "a device".into(), seconds: 1.5, cases };
    let table = report.table();
    assert!(table.contains("pool                             1       1.0e-8     1.0e-6  ok\n"), "{table}");
    assert!(
        table.contains("scale                            2       3.0e-2     1.0e-6  FAILED\n"),
        "{table}"
    );
    assert!(table.contains("FAILED scale: [5, 7]\n       x: too far\n"), "{table}");
    let error = report.verdict().unwrap_err();
    assert_eq!(error.message(), "1 of 3 cases failed on a device: `scale`");
    let json = json(&[report]);
    assert_eq!((json["failed"].as_u64(), json["passed"].as_bool()), (Some(1), Some(false)));
}

#[test]
fn an_operation_that_panics_fails_its_case_only() {
    let results = broken(Fault::Panic, "scale");
    assert!(!results.is_empty());
    assert!(results.iter().all(|result| !result.passed && result.note.contains("broken on purpose")));
}

/// The fault of [`Broken`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The last value of the output is a little off.
    Perturbed,
    /// The last value of the output is not written.
    Unwritten,
    /// The word after the output is written.
    Stray,
    /// Gradients are assigned where they should be added to.
    ForgetsToAccumulate,
    /// Masks of another step are used.
    WrongMask,
    Panic,
}

/// The results of the operation's cases on a device with the fault.
fn broken(fault: Fault, operation: &str) -> Vec<CaseResult> {
    run(&|| Ok(Box::new(Broken { inner: cpu(Isa::best(), 1)?, fault })), Some(operation))
}

#[test]
fn a_perturbed_value_is_found_in_every_operation() {
    let operations = [
        "patchify",
        "embed:",
        "embed_backward",
        "matmul none",
        "matmul bias",
        "matmul residual",
        "matmul gelu",
        "matmul tanh",
        "matmul_backward plain",
        "matmul_backward add",
        "matmul_backward gelu",
        "matmul_backward tanh",
        "layernorm:",
        "layernorm join",
        "layernorm_backward:",
        "layernorm_backward join",
        "residual: B",
        "residual_backward",
        "pool:",
        "pool_backward",
        "scale",
        "loss softmax",
        "loss sigmoid",
        "update sgd",
        "update adafactor",
        "update in a group",
    ];
    for operation in operations {
        let results = broken(Fault::Perturbed, operation);
        assert!(!results.is_empty(), "no cases of {operation}");
        for result in results {
            assert!(!result.passed, "{operation}: {} passes", result.case);
        }
    }
    // The large ones take too long. Those with a single query are among them.
    for operation in ["attention: B 3", "attention_backward: B 3"] {
        let results = broken(Fault::Perturbed, operation);
        assert!(results.iter().filter(is_judged).all(|result| !result.passed), "{operation}");
    }
}

/// Whether a case looks at the first sample, which the faults change: cases with NaN in it compare only its
/// neighbours.
fn is_judged(result: &&CaseResult) -> bool {
    !result.case.contains("NaN beside it")
}

#[test]
fn an_unwritten_value_and_a_stray_write_are_found() {
    for operation in ["matmul bias", "layernorm:", "attention: B 3", "pool:", "patchify", "loss softmax"] {
        for fault in [Fault::Unwritten, Fault::Stray] {
            let results = broken(fault, operation);
            assert!(!results.is_empty(), "no cases of {operation}");
            for result in results.iter().filter(is_judged) {
                assert!(!result.passed, "{fault:?} {operation}: {} passes", result.case);
            }
        }
    }
}

#[test]
fn forgotten_accumulation_and_wrong_masks_are_found() {
    for operation in ["matmul_backward", "layernorm_backward", "residual_backward", "embed_backward"] {
        let results = broken(Fault::ForgetsToAccumulate, operation);
        let found = results.iter().filter(|result| !result.passed).count();
        let expected = results.iter().filter(|result| result.case.contains("accumulating")).count();
        assert!(found > 0 && found <= expected, "{operation}: {found} of {expected}");
    }
    for operation in ["embed", "matmul gelu", "layernorm join", "residual", "attention"] {
        let results = broken(Fault::WrongMask, operation);
        let dropped = |r: &&CaseResult| r.case.contains("dropout") && !r.case.contains("T 1 ");
        let found = results.iter().filter(dropped).filter(|result| !result.passed).count();
        assert!(found > 0 && results.iter().filter(dropped).all(|result| !result.passed), "{operation}");
    }
}

/// The CPU with a fault.
struct Broken {
    inner: Box<dyn Backend>,
    fault: Fault,
}

impl Broken {
    /// Applies the fault to an output.
    fn spoil(&mut self, output: Mat) -> Result<()> {
        // The last value, as a matrix.
        let last = Mat { offset: output.offset + output.span_bytes() - 4, rows: 1, cols: 1, ld: 1, ..output };
        match self.fault {
            Fault::Perturbed => {
                let mut values = vec![0.0; output.rows * output.cols];
                self.inner.read(output, &mut values)?;
                let size = values.iter().map(|v| v * v).sum::<f32>().sqrt();
                self.inner.write(last, &[values[values.len() - 1] + 1e-3 * size.max(1.0)])
            }
            Fault::Unwritten => self.inner.write(last, &[f32::NAN]),
            Fault::Stray => self.inner.write(Mat { offset: last.offset + 4, ..last }, &[1.0]),
            Fault::Panic => panic!("broken on purpose"),
            Fault::ForgetsToAccumulate | Fault::WrongMask => Ok(()),
        }
    }
}

impl Backend for Broken {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn storage(&self) -> Storage {
        self.inner.storage()
    }
    fn precision(&self) -> Precision {
        self.inner.precision()
    }
    fn free_memory(&self) -> Result<usize> {
        self.inner.free_memory()
    }
    fn steps_ahead(&self) -> u64 {
        self.inner.steps_ahead()
    }
    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }
    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }
    fn allocated_bytes(&self) -> usize {
        self.inner.allocated_bytes()
    }
    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        self.inner.read_arena(arena)
    }
    fn join(&mut self, group: Group) -> Result<()> {
        self.inner.join(group)
    }
    fn tell_signal(&mut self, signal: i32) {
        self.inner.tell_signal(signal);
    }
    fn gradients_done(&mut self, from: usize) -> Result<()> {
        self.inner.gradients_done(from)
    }
    fn gather_ema(&mut self) -> Result<()> {
        self.inner.gather_ema()
    }
    fn algorithms(&self) -> Vec<String> {
        self.inner.algorithms()
    }
    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        self.inner.prefer_algorithms(algorithms)
    }
    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.inner.new_slot(layout)
    }
    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        self.inner.bind_batch(slot)
    }
    fn unbind_batch(&mut self) -> Option<Slot> {
        self.inner.unbind_batch()
    }
    fn report(&mut self) -> Result<StepReport> {
        self.inner.report()
    }
    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        let step = keys.step + u64::from(self.fault == Fault::WrongMask);
        self.inner.begin_step(StepKeys { step, ..keys })
    }
    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        let accumulate = micro.gradients.adds() && self.fault != Fault::ForgetsToAccumulate;
        self.inner.begin_micro(Micro { gradients: Write::add_if(accumulate), ..micro })
    }
    fn execute(&mut self, op: &Op) -> Result<()> {
        self.inner.execute(op)?;
        let result = match *op {
            Op::Patchify(op) => op.patches,
            Op::Embed(op) => op.x,
            Op::EmbedBackward(op) => op.d_y,
            Op::Matmul(op) => op.y,
            Op::MatmulBackward(op) => match op.d_x {
                InputGrad::None => return Ok(()),
                InputGrad::Plain(d_x) | InputGrad::Add(d_x) => d_x,
                InputGrad::Gelu { d_pre, .. } => d_pre,
                InputGrad::Tanh { d, .. } => d,
            },
            Op::Gelu(op) => op.y,
            Op::Swiglu(op) => op.y,
            Op::SwigluBackward(op) => op.d_pre,
            Op::LayerNorm(op) => op.y,
            Op::LayerNormBackward(op) => op.d_sum,
            Op::Residual(op) => match op.join {
                Join::Ready(_) => return Ok(()),
                Join::Branch { sum, .. } => *sum,
            },
            Op::ResidualBackward(op) => op.d_branch,
            Op::Rotate(op) => op.x,
            Op::Attention(op) => op.o,
            Op::AttentionBackward(op) => op.d_qkv,
            Op::QueryAttention(op) => op.o,
            Op::QueryAttentionBackward(op) => op.d_kv,
            Op::Pool(op) => op.y,
            Op::PoolBackward(op) => op.d_x,
            Op::Scale(op) => op.x,
            Op::Loss(op) => op.d_logits,
            Op::BeginReport | Op::AddToReport(_) => return Ok(()),
            Op::Update(update) => {
                let Some(last) = update.segments.last() else { return Ok(()) };
                let (offset, cols) = (4 * last.param, last.len);
                Mat { arena: Arena::Params, offset, rows: 1, cols, ld: cols, dtype: Dtype::F32 }
            }
        };
        self.spoil(result)
    }
    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.inner.allocate(plan)
    }
    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        self.inner.write(at, values)
    }
    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        self.inner.read(at, values)
    }
    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        self.inner.write_arena(arena, bytes)
    }
    fn swap_ema(&mut self) -> Result<()> {
        self.inner.swap_ema()
    }
}
