//! Several ways of doing the same work; the fastest one is used.
//!
//! Fusing work into a product is not always faster: an epilogue may keep the library from splitting a sum, or
//! from its best kernels. So every new shape is timed once, each way on the operands of the step ([`race`]).
//! The choice is stored with the algorithms of products, and later steps reuse it.

use std::collections::{BTreeMap, HashMap};

use super::blas::{Chosen, SetAside, Shape};
use super::driver::Address;
use super::race::race;
use super::{Arena, BLAS_WORKSPACE, Cuda};
use crate::backend::Choice;
use crate::error::Result;

/// Does the work, or returns false where it cannot be done this way.
type Attempt<'a> = dyn Fn(&mut Cuda) -> Result<bool> + 'a;

/// One way of doing the work.
pub(super) struct Way<'a> {
    pub(super) name: &'static str,
    pub(super) run: Box<Attempt<'a>>,
    /// Microseconds that another operation spends to make this way possible.
    pub(super) elsewhere: f32,
}

impl<'a> Way<'a> {
    pub(super) fn new(name: &'static str, run: impl Fn(&mut Cuda) -> Result<bool> + 'a) -> Self {
        Self { name, run: Box::new(run), elsewhere: 0.0 }
    }
}

/// The choices so far, as an index into the list of ways, per shape and first way: the ways available depend
/// on what was done before.
#[derive(Default)]
pub(super) struct Ways(HashMap<(Shape, &'static str), usize>);

/// Does the work in the fastest way for this shape, or by rule in the first that works; returns its index in
/// `ways`. `changed` is memory that the work both reads and changes, so that a second run would start from
/// other values.
///
/// # Errors
/// The device fails, or no way works: the last one always must, so that is a bug of ours.
pub(super) fn in_the_fastest_way(
    cuda: &mut Cuda,
    shape: &Shape,
    changed: &[(Address, usize)],
    ways: &[Way],
) -> Result<usize> {
    let key = (*shape, ways[0].name);
    if let Some(&at) = cuda.ways.0.get(&key) {
        assert!((ways[at].run)(cuda)?, "`{}` could be done before: {shape:?}", ways[at].name);
        return Ok(at);
    }
    let at = choose(cuda, shape, changed, ways)?;
    cuda.ways.0.insert(key, at);
    // If the first way lost, later calls omit it: store the same choice for the shorter list.
    if at > 0 {
        cuda.ways.0.insert((*shape, ways[1].name), at - 1);
    }
    Ok(at)
}

fn choose(cuda: &mut Cuda, shape: &Shape, changed: &[(Address, usize)], ways: &[Way]) -> Result<usize> {
    if let [only] = ways {
        assert!((only.run)(cuda)?, "the only way can always be done: {shape:?}");
        return Ok(0);
    }
    let first_that_can = |cuda: &mut Cuda| -> Result<usize> {
        for (at, way) in ways.iter().enumerate() {
            if (way.run)(cuda)? {
                return Ok(at);
            }
        }
        unreachable!("the last way can always be done: {shape:?}")
    };
    // Nothing can be timed while a step is recorded, but all its work has run once before.
    if cuda.blas.by_rule() || cuda.gpu.is_capturing() {
        return first_that_can(cuda);
    }
    let names: Vec<&str> = ways.iter().map(|way| way.name).collect();
    let key = format!("{} {}", shape.key(), names.join("/"));
    let known = cuda.blas.way(&key).cloned();
    if let Some(known) = known
        && let Some(at) = ways.iter().position(|way| way.name == known.way)
        && (ways[at].run)(cuda)?
    {
        cuda.blas.take_way(key, known);
        return Ok(at);
    }
    let gpu = cuda.gpu.clone();
    let aside = SetAside::new(&gpu, changed)?;
    let cleared = (cuda.arena(Arena::Workspace).address, gpu.properties().cache.min(BLAS_WORKSPACE));
    cuda.blas.rehearse(true);
    let times = race(&gpu, cleared, ways.len(), &mut |at| (ways[at].run)(cuda));
    cuda.blas.rehearse(false);
    let mut times = times?;
    aside.put_back()?;
    times.iter_mut().zip(ways).for_each(|(time, way)| *time += way.elsewhere);
    let able = times.iter().filter(|time| time.is_finite()).count();
    let at = (0..ways.len()).min_by(|a, b| times[*a].total_cmp(&times[*b])).expect("there is a way");
    assert!((ways[at].run)(cuda)?, "`{}` could be done before: {shape:?}", ways[at].name);
    if able > 1 {
        let named = times.iter().zip(ways).filter(|(time, _)| time.is_finite());
        let microseconds: BTreeMap<String, f32> =
            named.map(|(time, way)| (way.name.to_string(), *time)).collect();
        let chosen = Chosen { way: ways[at].name.into(), microseconds };
        cuda.blas.put_way(&key, &chosen);
        cuda.blas.take_way(key, chosen);
    }
    Ok(at)
}

/// The choices of this run, for people.
pub(super) fn choices(cuda: &Cuda) -> Vec<Choice> {
    let choice = |(key, chosen): (&String, &Chosen)| Choice {
        product: key.clone(),
        way: chosen.way.clone(),
        microseconds: chosen.microseconds.clone(),
    };
    cuda.blas.ways().map(choice).collect()
}
