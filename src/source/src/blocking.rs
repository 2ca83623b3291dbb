//! For threads that may wait: whole small files and directory listings.

use crate::{FileName, Operation, Patience, Pool, Request, Source, SourceError};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

fn run<T>(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    operation: Operation,
    patience: Patience,
    take: impl FnOnce(&[u8]) -> T,
) -> Result<T, SourceError> {
    let since = Instant::now();
    let slot = loop {
        // These few reads use the memory that repeated reads also use; it is
        // free again as soon as one of them ends, which may take as long as a
        // source is silent.
        match pool.take_reserved() {
            Some(slot) => break slot,
            None if patience.whole.is_some_and(|limit| since.elapsed() >= limit) => {
                return Err(SourceError::GaveUp {
                    file: file.clone(),
                    origin: source.name().into(),
                    attempts: 0,
                    seconds: since.elapsed().as_secs(),
                    last: "all memory is held by reads that are not answered".to_owned(),
                });
            }
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    source.submit(
        Request {
            file: file.clone(),
            operation,
            slot,
            patience,
        },
        Box::new(move |outcome| {
            // Nobody listens only if the waiting thread is gone.
            let _ = sender.send(outcome);
        }),
    );
    let filled = receiver.recv().map_err(|_| SourceError::Closed {
        origin: source.name().into(),
    })??;
    Ok(take(&filled.slot.bytes()[..filled.len]))
}

/// Reads the file from its start, at most `limit` bytes.
pub fn read_file(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    limit: usize,
    patience: Patience,
) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    while bytes.len() < limit {
        let want = pool.slot_size().min(limit - bytes.len());
        let operation = Operation::Read {
            offset: bytes.len() as u64,
            len: want,
            fresh: false,
        };
        let got = run(source, pool, file, operation, patience, |piece| {
            bytes.extend_from_slice(piece);
            piece.len()
        })?;
        if got < want {
            break;
        }
    }
    Ok(bytes)
}

/// The names in a directory, greatest first; only the greatest that fit a slot.
pub fn list(
    source: &dyn Source,
    pool: &Arc<Pool>,
    directory: &FileName,
    patience: Patience,
) -> Result<Vec<String>, SourceError> {
    run(
        source,
        pool,
        directory,
        Operation::List,
        patience,
        |bytes| {
            let text = String::from_utf8_lossy(bytes);
            text.lines().map(str::to_owned).collect()
        },
    )
}
