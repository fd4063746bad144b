//! The table passes on the CPU, and fails on a device that is broken in one place.

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::compute::{Compute, Isa};
use crate::backend::{
    Arena, Body, Dtype, Embed, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Loss, Mask, Mat, MemoryPlan,
    Micro, Norm, Normalise, PatchGrid, Pool, Slot, SlotLayout, Stats, StepKeys, StepReport, Storage, Update,
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

/// What is wrong with [`Broken`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The last value of the output is a little off.
    Perturbed,
    /// The last value of the output is not written.
    Unwritten,
    /// The word behind the output is written.
    Stray,
    /// Gradients are assigned where they should be added to.
    ForgetsToAccumulate,
    /// Masks of another step.
    WrongMask,
    Panic,
}

/// The results of the operation's cases on a device with a fault in it.
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
    ];
    for operation in operations {
        let results = broken(Fault::Perturbed, operation);
        assert!(!results.is_empty(), "no cases of {operation}");
        for result in results {
            assert!(!result.passed, "{operation}: {} passes", result.case);
        }
    }
    // The large ones would take their time. Those of a probe are among them.
    for operation in ["attention: B 3", "attention_backward: B 3"] {
        let results = broken(Fault::Perturbed, operation);
        assert!(results.iter().filter(is_judged).all(|result| !result.passed), "{operation}");
    }
}

/// Whether a case looks at the first sample, which the faults spoil: those with NaN in it look at its neighbours alone.
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
    /// Does to an output what the fault says.
    fn spoil(&mut self, output: Mat) -> Result<()> {
        // The last value, seen as a matrix of its own.
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

/// Methods that pass their arguments on, and spoil the output named last.
macro_rules! pass_on {
    ($($name:ident($($arg:ident: $type:ty),*) $(spoils $output:expr)?;)*) => {
        $(fn $name(&mut self, $($arg: $type),*) -> Result<()> {
            self.inner.$name($($arg),*)?;
            $(self.spoil($output)?;)?
            Ok(())
        })*
    };
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
        let accumulate = micro.accumulate && self.fault != Fault::ForgetsToAccumulate;
        self.inner.begin_micro(Micro { accumulate, ..micro })
    }
    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
        self.inner.matmul_backward(d_y, x, w, d_x)?;
        match d_x {
            InputGrad::None => Ok(()),
            InputGrad::Plain(d_x) | InputGrad::Add(d_x) => self.spoil(d_x),
            InputGrad::Gelu { d_pre, .. } => self.spoil(d_pre),
            InputGrad::Tanh { d, .. } => self.spoil(d),
        }
    }
    fn residual(&mut self, join: &Join) -> Result<()> {
        self.inner.residual(join)?;
        if let Join::Branch { sum, .. } = join { self.spoil(*sum) } else { Ok(()) }
    }
    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.inner.residual_backward(join, d_sum, d_branch, d_bias)?;
        self.spoil(d_branch)
    }
    fn update(&mut self, update: &Update) -> Result<()> {
        self.inner.update(update)?;
        let Some(last) = update.segments.last() else { return Ok(()) };
        let weights = Mat {
            arena: Arena::Params,
            offset: 4 * last.param,
            rows: 1,
            cols: last.len,
            ld: last.len,
            dtype: Dtype::F32,
        };
        self.spoil(weights)
    }

    pass_on! {
        allocate(plan: &MemoryPlan);
        write(at: Mat, values: &[f32]);
        read(at: Mat, values: &mut [f32]);
        write_arena(arena: Arena, bytes: &[u8]);
        swap_ema();
        patchify(grid: PatchGrid, normalise: Normalise, patches: Mat) spoils patches;
        embed(embed: &Embed, x: Mat) spoils x;
        embed_backward(embed: &Embed, d_x: Mat, d_y: Mat) spoils d_y;
        gelu(pre: Mat, form: Gelu, dropout: Mask, y: Mat) spoils y;
        matmul(x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) spoils y;
        layernorm(join: &Join, norm: &Norm, y: Mat, stats: Stats) spoils y;
        layernorm_backward(
            d_y: Mat, join: &Join, norm: &Norm, stats: Stats, d_sum: Mat, fresh: bool, d_branch: Mat,
            d_bias: Option<Mat>
        ) spoils d_sum;
        attention(heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) spoils o;
        attention_backward(
            heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask, d_o: Mat, d_qkv: Mat, d_bias: Option<Mat>
        ) spoils d_qkv;
        probe_attention(heads: Heads, q: Mat, kv: Mat, p: Mat, o: Mat, dropout: Mask) spoils o;
        probe_attention_backward(
            heads: Heads, q: Mat, kv: Mat, p: Mat, dropout: Mask, d_o: Mat, d_q: Mat, d_kv: Mat
        ) spoils d_kv;
        pool(pool: Pool, x: Mat, y: Mat) spoils y;
        pool_backward(pool: Pool, d_y: Mat, d_x: Mat, fresh: bool) spoils d_x;
        scale(x: Mat, factor: f32) spoils x;
        loss(loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) spoils d_logits;
        begin_report();
        add_to_report(samples: Mat);
    }
}
