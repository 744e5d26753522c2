//! The exceptions, and the one place where a core error becomes one of them.

use std::io;

use drift_fast_core::Error;
use pyo3::PyErr;
use pyo3::create_exception;
use pyo3::exceptions::{
    PyException, PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyOSError,
    PyValueError,
};

create_exception!(
    drift_fast,
    DriftError,
    PyException,
    "Base of the errors that drift_fast raises."
);
create_exception!(
    drift_fast,
    CheckpointError,
    DriftError,
    "A checkpoint that is invalid or contains tensors that cannot be subtracted."
);
create_exception!(
    drift_fast,
    AlignmentError,
    DriftError,
    "Two models whose tensors do not match, or match in two ways."
);
create_exception!(
    drift_fast,
    AmbiguousAlignmentError,
    AlignmentError,
    "Two models with two matches of their tensors that fit equally well."
);
create_exception!(
    drift_fast,
    CoverageError,
    DriftError,
    "Selected tensors without a match, so that part of the work would be left undone."
);
create_exception!(
    drift_fast,
    NonFiniteError,
    DriftError,
    "NaN or infinity in a source, or a difference beyond the output dtype's range."
);

pub(crate) fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::NotFound { .. } => PyFileNotFoundError::new_err(message),
        Error::Checkpoint { .. } | Error::Tensor { .. } => CheckpointError::new_err(message),
        Error::Ambiguous(_) => AmbiguousAlignmentError::new_err(message),
        Error::Alignment(_) => AlignmentError::new_err(message),
        Error::Exists { .. } => PyFileExistsError::new_err(message),
        Error::NoSpace { .. } | Error::Io { .. } => os_error(&error, message),
        Error::Argument(_) => PyValueError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        _ => DriftError::new_err(message),
    }
}

/// Python picks the subclass (`PermissionError`, for example) from the error number, and `pyo3` from the
/// kind where the system has no such numbers.
fn os_error(error: &Error, message: String) -> PyErr {
    match (error.errno(), error) {
        (Some(number), _) => PyOSError::new_err((number, message)),
        (None, Error::Io { source, .. }) => io::Error::new(source.kind(), message).into(),
        _ => PyOSError::new_err(message),
    }
}
