//! One pass from the blob to the image.

use crate::{LayerError, LayerOptions, LayerSummary, LowerLookup};
use accel_erofs::{Output, Uuid};
use accel_oci::Digest;
use std::io::Read;

/// The UUID of the image that is named by `digest`: a layer's diffID, or its
/// chain ID if the tree depends on the layers below (`ARCHITECTURE.md`, "The
/// EROFS image").
pub fn image_uuid(digest: &Digest) -> Uuid {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"image-accel layout 1 uuid");
    hasher.update(digest.as_bytes());
    let mut uuid = [0; 16];
    hasher.finalize_xof().fill(&mut uuid);
    // RFC 9562: version 8, variant 10.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Uuid(uuid)
}

/// Reads a layer's blob to its end and writes its image.
///
/// # Errors
/// See [`LayerError`]. What the output got until then is of no use.
pub fn convert_layer<R, L, O>(
    blob: R,
    options: &LayerOptions,
    lower: &mut L,
    output: O,
) -> Result<LayerSummary, LayerError<O::Error>>
where
    R: Read + Send,
    L: LowerLookup + ?Sized,
    O: Output,
{
    let _ = (blob, options, lower, output);
    unimplemented!()
}
