//! What the name of an architecture, the type of a model or the names of its tensors imply about a model.

use crate::backend::Gelu;
use crate::vit::config::{MapTokens, PoolKind, RopeIndexing, RopeKind};

/// Properties that tensors do not show; `None`: nothing is implied.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Usual {
    pub(super) heads: Option<usize>,
    pub(super) gelu: Option<Gelu>,
    pub(super) ln_eps: Option<f32>,
    pub(super) pool: Option<PoolKind>,
    pub(super) rope: Option<Rotary>,
    pub(super) map_heads: Option<usize>,
    pub(super) map_tokens: Option<MapTokens>,
}

/// The rotary positions of a model, if it has any.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rotary {
    pub(super) kind: RopeKind,
    pub(super) theta: Option<f32>,
    pub(super) reference: Option<(usize, usize)>,
    pub(super) offset: f32,
    pub(super) indexing: RopeIndexing,
}

impl Rotary {
    pub(super) const NONE: Rotary = Rotary::of(RopeKind::None);

    pub(super) const fn of(kind: RopeKind) -> Self {
        Self { kind, theta: None, reference: None, offset: 0.0, indexing: RopeIndexing::Ij }
    }
}

impl Usual {
    /// Its own properties, and those of `other` where it says nothing.
    pub(super) fn or(self, other: Usual) -> Usual {
        Usual {
            heads: self.heads.or(other.heads),
            gelu: self.gelu.or(other.gelu),
            ln_eps: self.ln_eps.or(other.ln_eps),
            pool: self.pool.or(other.pool),
            rope: self.rope.or(other.rope),
            map_heads: self.map_heads.or(other.map_heads),
            map_tokens: self.map_tokens.or(other.map_tokens),
        }
    }
}
