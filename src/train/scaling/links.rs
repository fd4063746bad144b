//! Links between the GPUs of a node and between nodes, and how long collectives take over them.

use crate::error::{Error, Result};

use super::chip::Chip;

/// Half of a ring's rate is reached at so many bytes on NVLink (published runs of nccl-tests).
const NVLINK_HALF: f64 = 20e6;
/// Seconds of the shortest collective.
const LATENCY: f64 = 25e-6;
/// Seconds that a stage of a tree between nodes adds.
const HOP: f64 = 12e-6;
/// What a network loses with every doubling of the nodes.
const LOSS_PER_DOUBLING: f64 = 0.04;

/// Where a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Between the ranks of a node.
    Inside,
    /// Between nodes.
    Across,
}

/// A link by its rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// As `--link` takes it.
    pub name: &'static str,
    /// Bytes per second of each rank.
    pub rate: f64,
    /// Bytes at which a collective has half of the rate.
    pub half: f64,
}

struct Known {
    name: &'static str,
    place: Place,
    rate: fn(&Chip) -> f64,
    half: f64,
    /// All GPUs of a node share one.
    one_per_node: bool,
}

const KNOWN: [Known; 8] = [
    Known {
        name: "nvlink",
        place: Place::Inside,
        rate: |c| c.nvlink,
        half: NVLINK_HALF,
        one_per_node: false,
    },
    Known { name: "pcie", place: Place::Inside, rate: |c| c.pcie, half: 4e6, one_per_node: false },
    Known { name: "shm", place: Place::Inside, rate: |_| 1e9, half: 0.0, one_per_node: false },
    Known { name: "ib800", place: Place::Across, rate: |_| 92e9, half: 0.0, one_per_node: false },
    Known { name: "ib400", place: Place::Across, rate: |_| 46e9, half: 0.0, one_per_node: false },
    Known { name: "ib200", place: Place::Across, rate: |_| 23e9, half: 0.0, one_per_node: false },
    Known { name: "ib100", place: Place::Across, rate: |_| 11e9, half: 0.0, one_per_node: false },
    Known { name: "eth100", place: Place::Across, rate: |_| 10e9, half: 0.0, one_per_node: true },
];

/// The links of a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Between the ranks of a node.
    pub inside: Link,
    /// Between nodes.
    pub across: Link,
}

impl Links {
    /// The links that `--link` names, for nodes of `per_node` chips. Each is a known name, or `NAME=GB/s` with
    /// a rate of its own; `default` is the link inside a node if none is named.
    ///
    /// # Errors
    /// An unknown name, a rate that is not a positive number, or two links for the same place.
    pub fn named(names: &[String], default: &str, chip: &Chip, per_node: usize) -> Result<Self> {
        let (mut inside, mut across) = (None, None);
        for text in names {
            let (name, rate) = text.split_once('=').map_or((text.as_str(), None), |(n, r)| (n, Some(r)));
            let (place, mut link) = find(name, chip, per_node)?;
            if let Some(rate) = rate {
                link.rate = rate.trim().parse().ok().filter(|r: &f64| *r > 0.0 && r.is_finite()).ok_or_else(
                    || {
                        Error::usage(format!("`--link {text}`: `{rate}` is no rate in GB/s"))
                            .hint(format!("write it as in `--link {name}=40`"))
                    },
                )? * 1e9;
            }
            let taken = if place == Place::Inside { &mut inside } else { &mut across };
            if let Some(Link { name: first, .. }) = taken.replace(link) {
                let where_ = if place == Place::Inside { "inside a node" } else { "between nodes" };
                return Err(Error::usage(format!("`--link` names two links {where_}: {first} and {name}"))
                    .hint(format!("use one of them, as in `--link {name}`")));
            }
        }
        Ok(Self {
            inside: inside.map_or_else(|| find(default, chip, per_node).map(|(_, link)| link), Ok)?,
            across: across.map_or_else(|| find("ib400", chip, per_node).map(|(_, link)| link), Ok)?,
        })
    }
}

fn find(name: &str, chip: &Chip, per_node: usize) -> Result<(Place, Link)> {
    let Some(known) = KNOWN.iter().find(|known| known.name == name) else {
        let names = KNOWN.iter().map(|known| format!("`{}`", known.name)).collect::<Vec<_>>().join(", ");
        return Err(Error::usage(format!("`--link {name}`: there is no such link")).hint(format!(
            "use one of {names}, or one of them with its rate in GB/s, as in `--link ib400=40`"
        )));
    };
    let shared = if known.one_per_node { per_node as f64 } else { 1.0 };
    Ok((known.place, Link { name: known.name, rate: (known.rate)(chip) / shared, half: known.half }))
}

impl Link {
    /// Seconds of a reduce-scatter or an all-gather of `bytes` over a ring of `ranks`.
    pub fn ring(&self, bytes: f64, ranks: usize) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let sent = bytes * (ranks - 1) as f64 / ranks as f64;
        LATENCY + (sent + self.half) / self.rate
    }

    /// Seconds of an all-reduce of `bytes` between `nodes`, one GPU of each.
    pub fn all_reduce(&self, bytes: f64, nodes: usize) -> f64 {
        if nodes == 1 {
            return 0.0;
        }
        let doublings = (nodes as f64).log2();
        let rate = self.rate * (1.0 - LOSS_PER_DOUBLING).powf((doublings - 1.0).max(0.0));
        let sent = 2.0 * bytes * (nodes - 1) as f64 / nodes as f64;
        self.small(nodes) + sent / rate
    }

    /// Seconds of a collective between `nodes` that carries next to nothing.
    pub fn small(&self, nodes: usize) -> f64 {
        if nodes == 1 { 0.0 } else { LATENCY + 2.0 * (nodes as f64).log2() * HOP }
    }
}
