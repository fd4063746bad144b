//! (to be written)
pub mod signals;
