//! Values that change from step to step: small structs in device memory that recorded kernels read
//! (`kernels/step.cuh`).
//!
//! The host writes the next step's params into a ring of page-locked copies and sends one before each step,
//! so that a pending copy is never overwritten.

use super::driver::{Address, Event, Gpu, Pinned, Stream};
use super::launch::{GroupScalars as Rates, SlotView, StepParams};
use crate::backend::{GroupScalars, HostMemory, Pixels, Slot, StepKeys, Update};
use crate::error::Result;

/// Parameter groups that a step may have.
pub(super) const MAX_GROUPS: usize = 512;
/// Copies of the params: the number of steps that may be submitted before the first is done.
const RING: usize = 8;

const PARAMS_BYTES: usize = size_of::<StepParams>().next_multiple_of(16);
/// Bytes on the device.
pub(super) const BYTES: usize = PARAMS_BYTES + MAX_GROUPS * size_of::<Rates>();

/// The params of one device.
pub(super) struct StepParamsRing {
    device: Address,
    ring: Vec<(Pinned, Event)>,
    next: usize,
    now: StepParams,
    rates: Vec<Rates>,
    pixels: Pixels,
    /// The device's copy is out of date.
    stale: bool,
}

impl StepParamsRing {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let slot = |_| Ok((gpu.allocate_pinned(BYTES)?, gpu.new_event()?));
        Ok(Self {
            device: 0,
            ring: (0..RING).map(slot).collect::<Result<_>>()?,
            next: 0,
            now: StepParams::default(),
            rates: vec![Rates::default(); MAX_GROUPS],
            pixels: Pixels::U8,
            stale: true,
        })
    }

    /// Assigns them [`BYTES`] bytes of device memory.
    pub(super) fn place(&mut self, device: Address) {
        self.device = device;
        self.stale = true;
    }

    /// `StepParams*`
    pub(super) fn address(&self) -> Address {
        self.device
    }

    /// `GroupScalars*`
    pub(super) fn rates(&self) -> Address {
        self.device + PARAMS_BYTES as u64
    }

    /// The pixel type of the bound batch.
    pub(super) fn pixels(&self) -> Pixels {
        self.pixels
    }

    pub(super) fn set_keys(&mut self, keys: StepKeys) {
        (self.now.seed, self.now.step) = (keys.seed, keys.step);
        self.stale = true;
    }

    /// The signal that this rank got, or 0.
    pub(super) fn set_signal(&mut self, signal: i32) {
        let signal = signal.unsigned_abs().into();
        self.stale |= self.now.signal != signal;
        self.now.signal = signal;
    }

    /// Binds `slot`, whose contents are, or will be, at `base`.
    pub(super) fn bind(&mut self, slot: &Slot, base: Address) {
        let [pixels, targets, partner, lambda, boxes, pixel_lambda, erase, _] =
            slot.layout().offsets().map(|at| base + at as u64);
        let (count, samples) = (slot.count as u32, slot.layout().samples as u32);
        self.pixels = slot.layout().pixels;
        self.now.slot =
            SlotView { pixels, targets, partner, lambda, boxes, pixel_lambda, erase, count, samples };
        self.stale = true;
    }

    pub(super) fn set_rates(&mut self, update: &Update) {
        assert!(update.groups.len() <= MAX_GROUPS, "{} parameter groups are too many", update.groups.len());
        self.now.t = update.t;
        self.stale = true;
        for (to, &GroupScalars { lr, decay }) in self.rates.iter_mut().zip(update.groups) {
            *to = Rates { lr, decay };
        }
    }

    /// Sends the current values, if they have changed, in the order of the compute stream.
    pub(super) fn send(&mut self, gpu: &Gpu) -> Result<()> {
        if !std::mem::take(&mut self.stale) {
            return Ok(());
        }
        let (copy, sent) = &mut self.ring[self.next];
        self.next = (self.next + 1) % RING;
        sent.synchronize()?;
        let bytes = copy.bytes_mut();
        bytes[..size_of::<StepParams>()].copy_from_slice(bytemuck::bytes_of(&self.now));
        bytes[PARAMS_BYTES..].copy_from_slice(bytemuck::cast_slice(&self.rates));
        // SAFETY: this copy of the ring is written again only after its event, which is waited for above.
        unsafe { gpu.upload_async(self.device, copy.bytes(), Stream::Compute)? };
        gpu.record_event(sent, Stream::Compute)
    }
}
