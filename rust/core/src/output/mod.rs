//! A delta or a merged model on disk.

pub mod format;
pub mod side_files;
pub mod writer;

pub use format::Storage;
pub use writer::Writer;
