//! Which recipe changes a resumed run may have, and the notes about them.

use crate::error::{Error, Result};
use crate::recipe::{Difference, Recipe};

use super::checkpoint::{RunDigest, RunState};
use super::run_data::RunData;
use super::{Trainer, setup};

/// Keys that a resumed run may change: places, intervals and threads, which change no bit of the result. Data may
/// move, because its records are compared. Precision and the type of the residual stream do change bits;
/// [`super::setup`] keeps them, or says so.
const FREE: [&str; 24] = [
    "data.train",
    "data.val",
    "data.on_bad_record",
    "data.workers",
    "data.slots",
    "data.verify",
    "data.accept_changes",
    "finetune.weights",
    "train.precision",
    "train.residual",
    "train.threads",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.report",
    "train.tensorboard",
    "train.max_skipped",
    "train.timeout",
    "train.patience",
    "train.min_delta",
    "train.name",
    "train.graph",
    "train.check_launches",
];

/// Keys that change the rounding, or what is done about rare steps, but not the training.
const OTHER_BITS: [&str; 10] = [
    "train.micro_batch",
    "train.reduce_chunks",
    "train.recompute",
    "train.prune_last_block",
    "train.deterministic",
    "train.spike_score",
    "train.spike_window",
    "train.on_spike",
    "train.rewind_after",
    "train.kernels",
];

/// Keys that decide which records are trained on.
const CHOOSE_RECORDS: [&str; 2] = ["data.balance", "data.holdout"];

/// The run's length, which also sets its schedule's length.
const LENGTH: &str = "train.steps";

/// The most differences that are listed.
const SHOWN: usize = 8;

/// What the resumed run would use.
pub(super) struct Now<'a> {
    pub recipe: &'a Recipe,
    pub data: &'a RunData,
    pub digest: &'a RunDigest,
    /// Whether changed data are accepted.
    pub accept: bool,
    /// The number of ranks, if there are several.
    pub ranks: Option<usize>,
}

impl Now<'_> {
    /// Refuses a state that cannot continue with these. Otherwise returns notes for the header.
    pub(super) fn fits(&self, state: &RunState) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let differences = differences(state, self.recipe)?;
        let is = |keys: &[&str], d: &Difference| keys.contains(&d.key.as_str());
        let refused: Vec<&Difference> = differences
            .iter()
            .filter(|d| !is(&FREE, d) && !is(&OTHER_BITS, d) && !is(&[LENGTH], d) && !is_evaluation(d))
            .collect();
        let more = refused.len().saturating_sub(SHOWN);
        let mut lines: Vec<String> = refused.iter().take(SHOWN).map(|d| d.to_string()).collect();
        lines.extend((more > 0).then(|| format!("and {more} more")));
        let other_recipe = || {
            Error::new(format!("the run was started with another recipe: {}", lines.join(", ")))
                .hint("remove these changes to continue with the run's own recipe, or start a new run with another `--out`")
        };
        // These keys choose the records, which then differ, too.
        if refused.iter().any(|d| is(&CHOOSE_RECORDS, d)) {
            return Err(other_recipe());
        }
        if let Some(saved) = &state.data {
            let same = self.data.same_as(saved, self.digest, self.accept);
            // Accepting the data alone would not continue the run.
            notes.extend(same.map_err(|e| match refused.is_empty() {
                true => e,
                false => e.hint(format!(
                    "restore the data, or start a new run with another `--out`: the recipe differs as well ({})",
                    lines.join(", ")
                )),
            })?);
        }
        if !refused.is_empty() {
            return Err(other_recipe());
        }
        let steps = self.recipe.train.steps.unwrap_or_default();
        if steps < state.step {
            return Err(Error::new(format!(
                "the run has already done {} steps, but `{LENGTH}` is {steps}",
                state.step
            ))
            .hint(format!("use `--set {LENGTH}={}` or more", state.step)));
        }
        if state.ranks != self.ranks && self.recipe.train.reduce_chunks.is_none() {
            let (was, is) = (state.ranks.unwrap_or(1), self.ranks.unwrap_or(1));
            notes.push(format!(
                "on {is} ranks instead of {was}: without `train.reduce_chunks`, results are no longer bit-identical to the \
                 original run"
            ));
        }
        for difference in &differences {
            if is(&OTHER_BITS, difference) {
                let bits = "results are no longer bit-identical to the original run";
                notes.push(format!("with {difference}: {bits}"));
            } else if is_evaluation(difference) {
                notes.push(format!("with {difference}: the search for the best checkpoint starts again"));
            }
        }
        Ok(notes)
    }

    /// A note about the learning rate, if the run's length changed.
    pub(super) fn of_schedule(&self, state: &RunState, trainer: &Trainer) -> Result<Option<String>> {
        let differences = differences(state, self.recipe)?;
        let Some(length) = differences.iter().find(|d| d.key == LENGTH) else { return Ok(None) };
        let before = Recipe::from_toml(&state.recipe, "the checkpoint's recipe")?;
        let before = setup::optimizer(&before, &trainer.model, self.data.train.len())?;
        let (was, is) = (before.lr(state.step), trainer.optimizer.lr(state.step));
        let schedule = format!("{:?}", self.recipe.schedule.kind).to_lowercase();
        Ok(Some(match was == is {
            true => format!("with {length}: the rate of the next step is {is:.3e}, as it would have been"),
            false => format!(
                "with {length}: the {schedule} schedule now has that length, and the rate of the next step is {is:.3e}, not \
                 {was:.3e}"
            ),
        }))
    }
}

/// Whether evaluations before and after the resume cannot be compared.
fn other_evaluation(state: &RunState, now: &Recipe) -> Result<bool> {
    Ok(differences(state, now)?.iter().any(is_evaluation))
}

fn is_evaluation(difference: &Difference) -> bool {
    difference.key.starts_with("eval.")
}

fn differences(state: &RunState, now: &Recipe) -> Result<Vec<Difference>> {
    let before = Recipe::from_toml(&state.recipe, "the checkpoint's recipe")
        .map_err(|e| e.into_failure().at("the run was started by another version of vitrum"))?;
    Ok(before.differences(now))
}

/// The state of a run that continues with `recipe`. If evaluations can no longer be compared, the best one is
/// forgotten.
pub(super) fn go_on(mut state: RunState, recipe: &Recipe) -> Result<RunState> {
    if other_evaluation(&state, recipe)? {
        (state.best, state.stale_evals) = (None, 0);
    }
    Ok(state)
}
