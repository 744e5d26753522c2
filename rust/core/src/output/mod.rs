//! A delta or a merged model on disk: its files, and how they are written completely or not at all.

pub mod checksums;
pub mod format;
pub mod layout;
mod naming;
pub mod side_files;
mod space;
mod staging;
mod target;
mod writer;

pub use format::{Slot, Storage};
pub use staging::RANKS;
pub use target::output_paths;
pub use writer::{OutputSpec, RankShare, Writer};
