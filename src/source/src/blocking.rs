//! For threads that may wait: whole small files and directory listings.

use crate::{
    FileName, Filled, Operation, Origin, Patience, Pool, Rejected, Request, Source, SourceError,
};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

fn run(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    operation: Operation,
    patience: Patience,
    rejected: Rejected,
) -> Result<Filled, SourceError> {
    let since = Instant::now();
    let slot = loop {
        // These few reads use the memory that repeated reads also use; it is
        // free again as soon as one of them ends, which may take as long as a
        // source is silent.
        match pool.take_reserved() {
            Some(slot) => break slot,
            None if patience.whole.is_some_and(|limit| since.elapsed() >= limit) => {
                return Err(SourceError::Silent {
                    file: file.clone(),
                    origin: source.name().into(),
                    reason: "all memory is held by reads that are not answered".to_owned(),
                });
            }
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    let request = Request {
        rejected,
        ..Request::new(file.clone(), operation, slot, patience)
    };
    source.submit(
        request,
        Box::new(move |outcome| {
            // Nobody listens only if the waiting thread is gone.
            let _ = sender.send(outcome);
        }),
    );
    receiver.recv().map_err(|_| SourceError::Closed {
        origin: source.name().into(),
    })?
}

/// Reads the file from its start, at most `limit` bytes.
pub fn read_file(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    limit: usize,
    patience: Patience,
) -> Result<Vec<u8>, SourceError> {
    let read = read_checked(source, pool, file, limit, patience, |bytes, _| {
        Ok::<_, std::convert::Infallible>(bytes.to_vec())
    });
    read.map(|read| match read {
        Ok(bytes) => bytes,
        Err(never) => match never {},
    })
}

/// Sees to it that the file is there: opens it, and reads nothing.
///
/// # Errors
/// It is not ([`SourceError::is_not_found`]), or nobody answers.
pub fn see_to(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    patience: Patience,
) -> Result<(), SourceError> {
    let nothing = Operation::Read {
        offset: 0,
        len: 0,
        fresh: false,
    };
    let rejected = Rejected::default();
    run(source, pool, file, nothing, patience, rejected).map(drop)
}

/// Reads the file from its start, at most `limit` bytes, and makes of it what
/// `check` does, which also learns who gave the last of it. What fails the check
/// counts as a wrong answer: other sources are asked as long as there are any. The
/// inner error is that of the first check.
pub fn read_checked<T, E: fmt::Display>(
    source: &dyn Source,
    pool: &Arc<Pool>,
    file: &FileName,
    limit: usize,
    patience: Patience,
    mut check: impl FnMut(&[u8], &Origin) -> Result<T, E>,
) -> Result<Result<T, E>, SourceError> {
    // A file of which nothing is wanted has no source to blame.
    let limit = limit.max(1);
    let mut rejected = Rejected::default();
    let mut first = None;
    loop {
        let mut bytes = Vec::new();
        let mut origins = Vec::new();
        let last = loop {
            let want = pool.slot_size().min(limit - bytes.len());
            let operation = Operation::Read {
                offset: bytes.len() as u64,
                len: want,
                fresh: false,
            };
            let filled = run(source, pool, file, operation, patience, rejected.clone());
            let filled = match (filled, first.take()) {
                (Ok(filled), problem) => {
                    first = problem;
                    filled
                }
                // All that came was wrong in the same way, or in another.
                (Err(_), Some(problem)) => return Ok(Err(problem)),
                (Err(error), None) => return Err(error),
            };
            bytes.extend_from_slice(filled.bytes());
            let ended = filled.len < want || bytes.len() == limit;
            if !origins.contains(&(filled.origin.clone(), filled.asked)) {
                origins.push((filled.origin.clone(), filled.asked));
            }
            if ended {
                break filled.origin;
            }
        };
        match check(&bytes, &last) {
            Ok(good) => return Ok(Ok(good)),
            Err(problem) => {
                for (origin, asked) in origins {
                    rejected.add_origin(origin, asked, problem.to_string());
                }
                first.get_or_insert(problem);
            }
        }
    }
}

/// The names in a directory, greatest first; only the greatest that fit a slot.
pub fn list(
    source: &dyn Source,
    pool: &Arc<Pool>,
    directory: &FileName,
    patience: Patience,
) -> Result<Vec<String>, SourceError> {
    let rejected = Rejected::default();
    let filled = run(source, pool, directory, Operation::List, patience, rejected)?;
    let text = String::from_utf8_lossy(filled.bytes());
    Ok(text.lines().map(str::to_owned).collect())
}
