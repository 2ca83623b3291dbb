//! Exit codes: what kind of thing went wrong, for scripts.

use crate::commands::{InUse, WrongResult};
use crate::published::PublishedError;
use crate::sink::SinkError;
use accel_image::ImageError;
use accel_layer::LayerError;
use accel_ufs::UfsError;

/// Everything went well.
pub const DONE: u8 = 0;
/// Something failed that has no code of its own.
pub const FAILED: u8 = 1;
/// Bytes are not what their digest promises.
pub const DAMAGED: u8 = 3;
/// The image cannot be had.
pub const SOURCE: u8 = 4;
/// UFS, or where else the result goes, cannot be used.
pub const STORAGE: u8 = 5;
/// Nodes use what was to be deleted.
pub const IN_USE: u8 = 6;
/// A signal ended the process.
pub const INTERRUPTED: u8 = 130;

/// The table for `--help`.
pub const HELP: &str = "\
Exit codes:
  0    done
  1    failed for another reason than those below
  2    wrong usage
  3    damaged: what was read is not what its digest promises, or no image or layer
  4    the image cannot be had: not there, refused, or the registry not reachable
  5    the shared file system (or the output) is missing, full or not writable
  6    in use: nodes use what was to be deleted
  130  ended by Ctrl-C, SIGTERM or SIGHUP; unfinished files were removed
With every code but 0, standard error says what failed and what to do.";

/// The code for an error.
pub fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(known).unwrap_or(FAILED)
}

fn known(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(error) = error.downcast_ref::<ImageError>() {
        return Some(match error {
            ImageError::Digest { .. }
            | ImageError::Size { .. }
            | ImageError::TooLarge { .. }
            | ImageError::Malformed { .. }
            | ImageError::LayerCount { .. } => DAMAGED,
            ImageError::Setup(_) => FAILED,
            _ => SOURCE,
        });
    }
    if let Some(error) = error.downcast_ref::<UfsError>() {
        return Some(match error {
            UfsError::Record { .. } | UfsError::Differs { .. } => DAMAGED,
            UfsError::NotConverted { .. } | UfsError::SourcePath { .. } => SOURCE,
            UfsError::Interrupted => INTERRUPTED,
            _ => STORAGE,
        });
    }
    if error.is::<InUse>() {
        return Some(IN_USE);
    }
    if error.is::<WrongResult>() {
        return Some(DAMAGED);
    }
    if let Some(error) = error.downcast_ref::<PublishedError>() {
        return Some(match error {
            PublishedError::Read { .. } => STORAGE,
            PublishedError::Damaged { .. }
            | PublishedError::Index { .. }
            | PublishedError::Start { .. } => DAMAGED,
        });
    }
    match error.downcast_ref::<LayerError<SinkError>>()? {
        LayerError::Read { .. } => Some(SOURCE),
        LayerError::Write { .. } => Some(STORAGE),
        // What is below says more.
        LayerError::Lower { .. } => None,
        _ => Some(DAMAGED),
    }
}
