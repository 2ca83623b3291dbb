//! One pass from the blob to the image.

use crate::{
    LayerError, LayerOptions, LayerSummary, LowerLookup,
    apply::{Applier, ApplyError},
    archive::{Archive, ArchiveError},
    decode::{self, Blocks, DecodeError, Outcome, Tar},
    options::Compression,
};
use accel_erofs::{ImageWriter, Output, Uuid};
use accel_oci::{ChainId, Digest};
use std::{error::Error, io::Read, thread};

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

/// The most bytes of the tar that are read behind its last entry, or behind the
/// first that is wrong.
const MAX_BEHIND: u64 = 256 << 20;

/// Reads a layer's blob to its end and writes its image.
///
/// The blob is read and decompressed on a thread of its own. If an expected digest
/// does not match, that is the error, whatever else was wrong with the bytes.
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
    let (feeder, blocks) = decode::pair();
    thread::scope(|scope| {
        let decoding = scope.spawn(|| feeder.run(blob, options.compression, &options.expected));
        let writer = ImageWriter::new(output, options.max_image_size);
        let mut applier = Applier::new(lower, options, writer);
        let mut archive = Archive::new(blocks, options.max_tar_size);
        let mut applied = apply_all(&mut applier, &mut archive, options);
        let offset = archive.position();
        let mut blocks: Blocks = archive.into_reader();
        let checked = options.expected.digest.is_some() || options.expected.size.is_some();
        match &applied {
            // Behind the last entry there may be more that belongs to the diffID.
            Ok(()) => {
                if !blocks.drain(MAX_BEHIND) {
                    applied = Err(LayerError::Tar {
                        layer: options.name.clone(),
                        offset,
                        problem: "more than 256 MiB lie behind the end of the archive",
                    });
                }
            }
            // Bytes that are not the layer's explain any of these.
            Err(
                LayerError::Tar { .. } | LayerError::Truncated { .. } | LayerError::Entry { .. },
            ) if checked => {
                blocks.drain(MAX_BEHIND);
            }
            Err(_) => {}
        }
        drop(blocks);
        // The thread returns whatever happens; a panic in it goes on here.
        let outcome = match decoding.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let Tar {
            diff_id,
            size: tar_size,
        } = outcome.tar;
        let (digest, size) = check_blob(outcome, applied, options)?;
        if let Some(expected) = options.expected.diff_id
            && expected != diff_id
        {
            return Err(LayerError::DiffId {
                layer: options.name.clone(),
                expected,
                found: diff_id,
            });
        }

        let chain_id = ChainId::new(options.parent, diff_id);
        let needs_lower = applier.needs_lower;
        let uuid = image_uuid(if needs_lower { &chain_id.0 } else { &diff_id.0 });
        let (image, _) = applier
            .writer
            .finish(&applier.tree, uuid)
            .map_err(|source| write_error(options, source))?;
        Ok(LayerSummary {
            digest,
            size,
            diff_id,
            tar_size,
            chain_id,
            needs_lower,
            whiteouts: applier.whiteouts,
            uuid,
            image,
            ignored_xattrs: applier.ignored_xattrs,
        })
    })
}

fn write_error<E: Error>(
    options: &LayerOptions,
    source: accel_erofs::WriteError<E>,
) -> LayerError<E> {
    LayerError::Write {
        layer: options.name.clone(),
        source,
    }
}

/// Applies every entry of the tar.
fn apply_all<L: LowerLookup + ?Sized, O: Output>(
    applier: &mut Applier<'_, L, O>,
    archive: &mut Archive<Blocks>,
    options: &LayerOptions,
) -> Result<(), LayerError<O::Error>> {
    let layer = || options.name.clone();
    let archive_error = |error| match error {
        // Blocks never fail: the thread says why they end.
        ArchiveError::Read(source) => LayerError::Read {
            layer: layer(),
            offset: 0,
            source,
        },
        ArchiveError::Header { offset, problem } => LayerError::Tar {
            layer: layer(),
            offset,
            problem,
        },
        ArchiveError::Truncated { offset } => LayerError::Truncated {
            layer: layer(),
            offset,
        },
    };
    while let Some(entry) = archive.next().map_err(archive_error)? {
        applier
            .apply(&entry, archive)
            .map_err(|error| match error {
                ApplyError::Archive(error) => archive_error(error),
                ApplyError::Entry(problem) => LayerError::Entry {
                    layer: layer(),
                    entry: String::from_utf8_lossy(&entry.path).into_owned(),
                    problem,
                },
                ApplyError::Lower { path, source } => LayerError::Lower {
                    layer: layer(),
                    path,
                    source,
                },
                ApplyError::Write(source) => write_error(options, source),
            })?;
    }
    applier.finish();
    Ok(())
}

/// The first cause of all that can be wrong: the output, the blob's bytes, what
/// they decompress to, what that says.
fn check_blob<E: Error>(
    outcome: Outcome,
    applied: Result<(), LayerError<E>>,
    options: &LayerOptions,
) -> Result<(Digest, u64), LayerError<E>> {
    let layer = || options.name.clone();
    if let Err(error @ (LayerError::Write { .. } | LayerError::Lower { .. })) = applied {
        return Err(error);
    }
    if let Some(blob) = outcome.blob {
        if let Some(expected) = options.expected.size
            && expected != blob.size
        {
            return Err(LayerError::Size {
                layer: layer(),
                expected,
                found: blob.size,
            });
        }
        if let Some(expected) = options.expected.digest
            && expected != blob.digest
        {
            return Err(LayerError::Digest {
                layer: layer(),
                expected,
                found: blob.digest,
            });
        }
    }
    match outcome.error {
        None => {}
        Some(DecodeError::Read { offset, source }) => {
            return Err(LayerError::Read {
                layer: layer(),
                offset,
                source,
            });
        }
        Some(DecodeError::Size { found }) => {
            return Err(LayerError::Size {
                layer: layer(),
                expected: options.expected.size.unwrap_or_default(),
                found,
            });
        }
        Some(DecodeError::Compression { found }) => {
            return Err(LayerError::Compression {
                layer: layer(),
                declared: options.compression.unwrap_or(Compression::None),
                found,
            });
        }
        Some(DecodeError::Decompress {
            compression,
            offset,
            source,
        }) => {
            return Err(LayerError::Decompress {
                layer: layer(),
                compression,
                offset,
                source,
            });
        }
    }
    applied?;
    // Without an error the blob was read to its end.
    outcome
        .blob
        .map(|blob| (blob.digest, blob.size))
        .ok_or_else(|| LayerError::Read {
            layer: layer(),
            offset: 0,
            source: std::io::Error::other("the blob was not read to its end"),
        })
}
