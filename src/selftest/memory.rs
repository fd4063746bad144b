//! Arenas and batch slots: reads return what was written, and padding stays unchanged.

use crate::backend::{Arena, Dtype, Mat, MemoryPlan, Pixels, SlotLayout, TargetKind};
use crate::error::Result;

use super::harness::{Case, Trial};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("allocate", "zeroed, and as large as the plan", allocate),
        Case::new("swap_ema", "there and back", swap_ema),
        Case::new("bind_batch", "slots come back with their contents", bind_batch),
    ];
    for (rows, cols, gap) in [(1, 1, false), (65, 60, true), (257, 7, true), (3, 192, false)] {
        let title = format!("[{rows}, {cols}]{}", if gap { ", gaps between rows" } else { "" });
        cases.push(Case::new("read, write", title, move |t| read_write(t, rows, cols, gap)));
    }
    cases
}

fn allocate(t: &mut Trial) -> Result<()> {
    let mut plan = MemoryPlan::new(t.storage());
    let sizes = [1024, 768, 512, 256, 1024, 0];
    for (arena, bytes) in Arena::ALL.into_iter().zip(sizes) {
        plan.set_bytes(arena, bytes);
    }
    plan.activation("x", 3, 100);
    let mut backend = t.open()?;
    backend.allocate(&plan)?;
    let bytes = backend.allocated_bytes();
    let arenas: Vec<Vec<u8>> =
        Arena::ALL.iter().map(|arena| backend.read_arena(*arena)).collect::<Result<_>>()?;

    t.expect("the allocated bytes are those of the plan", bytes == plan.total_bytes());
    for (arena, held) in Arena::ALL.into_iter().zip(arenas) {
        t.expect(&format!("{arena:?} has its size"), held.len() == plan.bytes(arena));
        t.expect(&format!("{arena:?} starts with zeros"), held.iter().all(|byte| *byte == 0));
    }
    Ok(())
}

fn read_write(t: &mut Trial, rows: usize, cols: usize, gap: bool) -> Result<()> {
    let target = t.output_with_gap(rows, cols, gap);
    let neighbour = t.input(rows, cols, 1.0);
    let values: Vec<f32> = t.normal(rows * cols, 1.0).iter().map(|v| *v as f32).collect();
    let expected: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
    t.start()?.write(target.mat, &values)?;
    t.compare("what was written", &target, &expected, 0.0)?;
    t.compare("its neighbour", &neighbour, &neighbour.values, 0.0)
}

fn swap_ema(t: &mut Trial) -> Result<()> {
    let bytes =
        |first: f32| -> Vec<u8> { (0u8..64).flat_map(|i| (first + f32::from(i)).to_le_bytes()).collect() };
    let (weights, average) = (bytes(1.0), bytes(100.0));
    t.arena(Arena::Params, weights.clone());
    t.arena(Arena::Ema, average.clone());
    // An operation must find the average where the weights were.
    let mat = Mat { arena: Arena::Params, offset: 0, rows: 4, cols: 16, ld: 16, dtype: Dtype::F32 };
    let mut read = vec![0.0f32; 64];

    let backend = t.start()?;
    backend.swap_ema()?;
    let swapped = [backend.read_arena(Arena::Params)?, backend.read_arena(Arena::Ema)?];
    backend.read(mat, &mut read)?;
    backend.swap_ema()?;
    t.expect("the weights are the average", swapped[0] == average);
    t.expect("the average is the weights", swapped[1] == weights);
    t.expect(
        "a matrix of the weights reads the average",
        read.iter().zip(100u8..).all(|(v, i)| *v == f32::from(i)),
    );
    Ok(())
}

fn bind_batch(t: &mut Trial) -> Result<()> {
    let layout = SlotLayout {
        samples: 3,
        image: (4, 5),
        pixels: Pixels::U8,
        targets: TargetKind::Dense { classes: 7 },
    };
    let backend = t.start()?;
    let mut fresh = Vec::new();
    for position in [1, 2] {
        let mut slot = backend.new_slot(layout)?;
        fresh.push(slot.layout() == layout && slot.count == 3 && slot.lambda().iter().all(|l| *l == 1.0));
        slot.position = position;
        slot.images_u8_mut().fill(position as u8);
        // A device that is still copying keeps the first slot for now.
        if let Some(back) = backend.bind_batch(slot)? {
            fresh.push(back.position == 1 && back.images_u8().iter().all(|pixel| *pixel == 1));
        }
    }
    let last = backend.unbind_batch();
    let rest = backend.unbind_batch();
    t.expect(
        "new slots have their layout and mix nothing, and come back unchanged",
        fresh.iter().all(|ok| *ok),
    );
    t.expect("the bound slot comes back", last.is_some_and(|s| s.position == 2 && s.images_u8()[0] == 2));
    t.expect("and only once", rest.is_none_or(|slot| slot.position == 1));
    Ok(())
}
