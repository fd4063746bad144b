//! The optimiser as numbers: which tensors, which rates, which rule. The backend does the arithmetic.
//!
//! [`Optimizer::new`] turns the recipe's `optim` and `schedule` sections into a table of segments over the
//! flat buffers, once. Each step then calls [`Optimizer::update`], which fills in the step's rates. The
//! backend clips, updates and averages in one pass.
//!
//! `optim.decay_mode` chooses between two dialects of the learning rate:
//! * `torch`: the schedule gives absolute rates, and decay is multiplied by them: `θ ← θ - lr_t·(u + wd·θ)`.
//! * `big_vision`: the schedule `s` is relative, and decay follows only it: `θ ← θ - s_t·(lr·u + wd·θ)`.
//!
//! Decay is always decoupled from the gradient, whatever the rule.

#![forbid(unsafe_code)]

mod groups;
mod layers;
mod schedule;
mod table;

pub use groups::is_frozen;
pub use schedule::{RunLength, Schedule};

use crate::backend::{GroupScalars, Limits, Rule, Segment, Update};
use crate::error::{Error, Result};
use crate::recipe::{DecayMode, GroupSection, MomentType, OptimName, OptimSection, ScheduleSection};
use crate::vit::config::ModelConfig;
use crate::vit::params::{Param, ParamLayout};

use groups::{Part, Patterns};

/// The optimiser of a run.
pub struct Optimizer {
    rule: Rule,
    segments: Vec<Segment>,
    groups: Vec<Group>,
    /// The recipe's schedule, then the schedules of groups.
    schedules: Vec<Schedule>,
    /// Index of the head's schedule, for the log.
    head_schedule: usize,
    mode: DecayMode,
    lr: f64,
    /// The factor of `lr_scale_batch` on the base rate.
    batch_scale: f64,
    clip: Option<f32>,
    clip_torch: bool,
    ema_decay: Option<f64>,
    /// What the next update may have without being skipped.
    pub limits: Limits,
    grad_elements: usize,
    moment2_elements: usize,
    /// The rates of the last requested update.
    scalars: Vec<GroupScalars>,
}

/// Parameters with one rate and one decay.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Group {
    lr_mult: f64,
    /// `weight_decay` times the group's multiplier; 0 means no decay.
    decay: f64,
    schedule: usize,
}

impl Optimizer {
    /// `layout` must have been made with [`is_frozen`]. Errors name the key, the pattern or the parameter.
    pub fn new(
        optim: &OptimSection,
        schedule: &ScheduleSection,
        layout: &ParamLayout,
        config: &ModelConfig,
        run: RunLength,
    ) -> Result<Optimizer> {
        validate(optim)?;
        layers::check(optim, config.depth)?;
        let patterns = Patterns::new(&optim.groups)?;
        check_matches(&optim.groups, &patterns, layout)?;

        let mut o = Optimizer {
            rule: rule(optim),
            segments: Vec::new(),
            groups: Vec::new(),
            schedules: vec![Schedule::new(schedule, run)?],
            head_schedule: 0,
            mode: optim.decay_mode,
            lr: optim.lr,
            batch_scale: match optim.lr_scale_batch {
                0 => 1.0,
                reference => run.batch as f64 / reference as f64,
            },
            clip: (optim.clip > 0.0).then_some(optim.clip),
            clip_torch: optim.clip_torch,
            limits: Limits::NONE,
            ema_decay: (optim.ema > 0.0).then_some(optim.ema),
            grad_elements: layout.grad_elements,
            moment2_elements: 0,
            scalars: Vec::new(),
        };
        let mut own_schedules = Vec::new();
        for (i, group) in optim.groups.iter().enumerate() {
            own_schedules.push(match &group.schedule {
                Some(section) if !group.frozen => {
                    let own = Schedule::new(section, run).map_err(|e| e.at(groups::place(i, group)))?;
                    o.schedules.push(own);
                    o.schedules.len() - 1
                }
                _ => 0,
            });
        }

        for param in layout.parameters() {
            let parts = groups::parts(param);
            let sections: Vec<_> = parts.iter().map(|part| patterns.first(&part.names)).collect();
            let frozen = sections.iter().filter(|s| s.is_some_and(|i| optim.groups[i].frozen)).count();
            if frozen > 0 && frozen < parts.len() {
                return Err(Error::usage(format!(
                    "`optim.groups` freezes only a part of `{}`, but q, k and v are one tensor here",
                    param.name
                ))
                .hint(format!("freeze all of it: `pattern = \"{}\"`", param.name.replace('.', "\\\\."))));
            }
            let Some(grad) = param.grad_offset else { continue };
            assert_eq!(frozen, 0, "{}: frozen by the recipe, trained by the layout", param.name);

            let members: Vec<usize> = sections
                .iter()
                .map(|section| {
                    let schedule = section.map_or(0, |i| own_schedules[i]);
                    let section = section.map(|i| &optim.groups[i]);
                    o.group_index(group_of(optim, config, param, section, schedule))
                })
                .collect();
            if param.kind.is_head() {
                o.head_schedule = o.groups[members[0]].schedule;
            }
            o.add_segments(optim, config, param, grad, &parts, &members);
        }
        if o.segments.is_empty() {
            return Err(Error::usage("`optim` freezes every parameter")
                .hint("leave at least the head trainable: put a group with `pattern = \"head/.*\"` first"));
        }
        match o.rule {
            Rule::Adam { .. } => o.moment2_elements = layout.grad_elements,
            Rule::Sgd { .. } | Rule::Lion { .. } | Rule::Adafactor { .. } => {}
        }
        Ok(o)
    }

    fn group_index(&mut self, group: Group) -> usize {
        self.groups.iter().position(|g| *g == group).unwrap_or_else(|| {
            self.groups.push(group);
            self.groups.len() - 1
        })
    }

    /// Adds one segment for the tensor, or one per part if the parts differ or Adafactor needs them
    /// separately.
    fn add_segments(
        &mut self,
        optim: &OptimSection,
        config: &ModelConfig,
        param: &Param,
        grad: usize,
        parts: &[Part],
        members: &[usize],
    ) {
        let adafactor = matches!(self.rule, Rule::Adafactor { .. });
        if !adafactor && members.iter().all(|group| *group == members[0]) {
            self.segments.push(table::whole(param, grad, members[0]));
            return;
        }
        for (part, group) in parts.iter().zip(members) {
            let mut segment = table::share(param, grad, *group, part);
            if adafactor {
                let factor = table::factor(param, part, config, optim.min_factor, self.moment2_elements);
                self.moment2_elements += factor.state_len().next_multiple_of(STATE_ALIGN);
                segment.factor = Some(factor);
            }
            self.segments.push(segment);
        }
    }

    /// How gradients become updates.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The tensors in the order of the flat buffers.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of the first moments. They have the layout of the gradients, in f32 or bf16.
    pub fn moment1_bytes(&self) -> usize {
        self.grad_elements * self.rule.first_moment().bytes()
    }

    /// Bytes of the second moments. Adam's have the layout of the gradients, Adafactor's are its statistics,
    /// other rules have none.
    pub fn moment2_bytes(&self) -> usize {
        self.moment2_elements * 4
    }

    /// The head's learning rate after `t` updates, without group multipliers. The log shows it.
    pub fn lr(&self, t: u64) -> f64 {
        self.rates(t, self.head_schedule).0
    }

    /// Decay of the weights' moving average, if the recipe keeps one.
    pub fn ema_decay(&self) -> Option<f64> {
        self.ema_decay
    }

    /// The factor by which the batch size scales the base rate; 1 if the recipe does not ask for it.
    pub fn batch_scale(&self) -> f64 {
        self.batch_scale
    }

    /// The rates of every group for the update that follows `t` updates.
    pub fn scalars(&self, t: u64) -> Vec<GroupScalars> {
        self.groups.iter().map(|group| self.group_scalars(t, group)).collect()
    }

    /// The update that follows `t` updates.
    pub fn update(&mut self, t: u64) -> Update<'_> {
        self.scalars = self.scalars(t);
        Update {
            rule: self.rule,
            segments: &self.segments,
            groups: &self.scalars,
            t: t + 1,
            clip: self.clip,
            clip_torch: self.clip_torch,
            ema_decay: self.ema_decay,
            limits: self.limits,
        }
    }

    fn group_scalars(&self, t: u64, group: &Group) -> GroupScalars {
        let (lr, relative) = self.rates(t, group.schedule);
        let lr = lr * group.lr_mult;
        let decay = match self.mode {
            DecayMode::Torch => lr * group.decay,
            DecayMode::BigVision => relative * group.decay,
        };
        GroupScalars { lr: lr as f32, decay: decay as f32 }
    }

    /// The rate, and big_vision's relative schedule. The batch size scales that schedule, and so the decay.
    fn rates(&self, t: u64, schedule: usize) -> (f64, f64) {
        let schedule = &self.schedules[schedule];
        match self.mode {
            DecayMode::Torch => (schedule.value(t, self.lr * self.batch_scale), 0.0),
            DecayMode::BigVision => {
                let relative = schedule.value(t, self.batch_scale);
                (self.lr * relative, relative)
            }
        }
    }
}

/// Adafactor's statistics of a tensor start at multiples of this many elements.
const STATE_ALIGN: usize = 64;

fn rule(optim: &OptimSection) -> Rule {
    let bf16 = optim.moment == MomentType::Bf16;
    let &OptimSection { momentum, nesterov, beta1, beta2, eps, beta2_cap, decay_power, clip_rms, .. } = optim;
    match optim.name {
        OptimName::Sgd => Rule::Sgd { momentum, nesterov, bf16 },
        OptimName::Adam | OptimName::AdamW => Rule::Adam { beta1, beta2, eps, bf16 },
        OptimName::Lion => Rule::Lion { beta1, beta2, bf16 },
        OptimName::Adafactor => {
            let clip_rms = (clip_rms > 0.0).then_some(clip_rms);
            Rule::Adafactor { momentum, beta2_cap, decay_power, clip_rms, bf16 }
        }
    }
}

/// The rate and decay of one part: its group's values, and defaults for values that the group leaves open.
fn group_of(
    optim: &OptimSection,
    config: &ModelConfig,
    param: &Param,
    section: Option<&GroupSection>,
    schedule: usize,
) -> Group {
    let part = if param.kind.is_head() { 1.0 } else { optim.backbone_lr_mult };
    let default_lr = part * layers::scale(optim, param, config.depth);
    let default_decay = f64::from(u8::from(groups::is_decayed(optim.decay_on, param)));
    Group {
        lr_mult: section.and_then(|s| s.lr_mult).unwrap_or(default_lr),
        decay: optim.weight_decay * section.and_then(|s| s.decay_mult).unwrap_or(default_decay),
        schedule,
    }
}

/// Refuses patterns without any effect: mistyped ones, and ones after a pattern that matches everything.
fn check_matches(sections: &[GroupSection], patterns: &Patterns, layout: &ParamLayout) -> Result<()> {
    let parts: Vec<Part> = layout.parameters().flat_map(groups::parts).collect();
    for (i, section) in sections.iter().enumerate() {
        if !parts.iter().any(|part| patterns.matches(i, &part.names)) {
            return Err(Error::usage(format!("{}: matches no parameter", groups::place(i, section)))
                .hint("a pattern must match a whole name, such as `head/.*` or `blocks\\.0\\..*`"));
        }
        if !parts.iter().any(|part| patterns.first(&part.names) == Some(i)) {
            return Err(Error::usage(format!(
                "{}: all its parameters already belong to earlier groups",
                groups::place(i, section)
            ))
            .hint("the first match wins: move this group up, or remove it"));
        }
    }
    Ok(())
}

fn validate(optim: &OptimSection) -> Result<()> {
    let check = |key: &str, value: f64, fits: bool, hint: &str| {
        if value.is_finite() && fits {
            return Ok(());
        }
        Err(Error::usage(format!("`optim.{key}` is {value}")).hint(hint))
    };
    let from_zero = |key, value: f64| check(key, value, value >= 0.0, "use a number of at least 0");
    let below_one = |key, value: f64| {
        check(key, value, (0.0..1.0).contains(&value), "use a number of at least 0 and below 1")
    };
    from_zero("lr", optim.lr)?;
    from_zero("weight_decay", optim.weight_decay)?;
    from_zero("backbone_lr_mult", optim.backbone_lr_mult)?;
    from_zero("layer_decay", optim.layer_decay)?;
    from_zero("clip", f64::from(optim.clip))?;
    from_zero("clip_rms", optim.clip_rms)?;
    below_one("momentum", optim.momentum)?;
    below_one("beta1", optim.beta1)?;
    below_one("beta2", optim.beta2)?;
    below_one("beta2_cap", optim.beta2_cap)?;
    below_one("ema", optim.ema)?;
    check("decay_power", optim.decay_power, optim.decay_power > 0.0, "use 0.8")?;
    // Without it a gradient of exactly zero would be divided by zero.
    check("eps", optim.eps, optim.eps as f32 > 0.0, "use 1e-8")?;
    for (i, group) in optim.groups.iter().enumerate() {
        let at = |e: Error| e.at(groups::place(i, group));
        from_zero("groups.lr_mult", group.lr_mult.unwrap_or(0.0)).map_err(at)?;
        from_zero("groups.decay_mult", group.decay_mult.unwrap_or(0.0)).map_err(at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
