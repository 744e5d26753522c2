//! Stream the difference of two checkpoints, tensor by tensor, without loading a model.
//!
//! Data goes one way: [`Checkpoint`] → [`align()`](align::align) → [`stream`] → [`Writer`]. This
//! crate knows bytes, names, shapes and dtypes; it knows neither torch nor Python.

pub mod accompany;
pub mod align;
mod budget;
pub mod checkpoint;
pub mod compose;
pub mod dtype;
pub mod error;
pub mod kernel;
pub mod likeness;
pub mod memory;
pub mod merge;
mod order;
mod ranges;
pub mod scales;
pub mod shard;
pub mod storage;
pub mod stream;
mod workers;
pub mod writer;

pub use checkpoint::Checkpoint;
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use kernel::Moments;
pub use shard::Reader;
pub use storage::Storage;
pub use writer::Writer;
