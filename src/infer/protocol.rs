//! How pictures are prepared for a model: the published protocols by name, and settings of one's own.

use crate::error::{Error, Result};
use crate::recipe::{EvalResize, PROTOCOLS};

/// How pictures are prepared, and which are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Protocol {
    /// The resize and the crop.
    pub resize: EvalResize,
    /// Share of the resized picture that the centre crop keeps, in (0, 1].
    pub crop_ratio: f32,
    /// The name that the user gave. Several systems may share the same settings.
    pub asked: Option<&'static str>,
    /// Skip an incomplete last batch, as google-research/vision_transformer does.
    pub drop_last: bool,
}

impl Protocol {
    /// The protocol with this name. An unknown name is wrong usage.
    pub fn named(name: &str) -> Result<Self> {
        let found = PROTOCOLS.into_iter().find(|(known, ..)| *known == name);
        let (asked, resize, crop_ratio) = found.ok_or_else(|| {
            let known = PROTOCOLS.map(|(name, ..)| format!("`{name}`")).join(", ");
            Error::usage(format!("there is no protocol `{name}`"))
                .hint(format!("use one of {known}; `vitrum eval` also takes `all`"))
        })?;
        Ok(Self { resize, crop_ratio, asked: Some(asked), drop_last: false })
    }

    /// The protocol's name, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        let same = |(_, resize, ratio): &(&str, EvalResize, f32)| {
            *resize == self.resize && (*ratio - self.crop_ratio).abs() < 1e-6
        };
        self.asked.or_else(|| PROTOCOLS.into_iter().find(same).map(|(name, ..)| name))
    }
}
