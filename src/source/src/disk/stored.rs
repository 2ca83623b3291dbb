//! The cache's index on disk: read once, then written page by page.

use super::table::PAGE;
use super::{INDEX, INDEX_PATIENCE, MEMORY_PAUSE, SLOT, Shared, WRITE_ATTEMPT};
use crate::{FileName, Operation, Patience, Request, Source, StartError, WorkerSource};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

impl Shared {
    /// Reads the index, once the writer has made it.
    pub(super) fn make_ready(&self) {
        let trouble = match self.writer.wait_ready(Duration::ZERO) {
            // Not yet.
            Err(StartError::Silent { .. }) => return,
            Err(StartError::Worker { reason, .. }) => reason,
            Err(error) => error.to_string(),
            Ok(()) => match self.load() {
                Ok(()) => {
                    let mut state = self.lock();
                    (state.ready, state.trouble) = (true, None);
                    let entries = state.table.len();
                    let capacity = state.table.capacity();
                    drop(state);
                    tracing::info!(
                        cache = self.name,
                        entries,
                        capacity,
                        "the disk cache is in use"
                    );
                    return;
                }
                Err(reason) => reason,
            },
        };
        let mut state = self.lock();
        let news = state.trouble.replace(trouble.clone()) != Some(trouble.clone());
        drop(state);
        if news {
            tracing::warn!(
                cache = self.name,
                why = trouble,
                "the disk cache cannot be used; going on without it"
            );
        }
    }

    fn load(&self) -> Result<(), String> {
        let pages = self.lock().table.pages();
        let mut page = 0;
        let until = Instant::now() + INDEX_PATIENCE;
        while page < pages {
            let len = (SLOT / PAGE).min(pages - page) * PAGE;
            let operation = Operation::Read {
                offset: (1 + page) as u64 * PAGE as u64,
                len,
                fresh: false,
            };
            let buffer = self.buffers.chunks().take();
            let buffer = buffer.ok_or("no memory to read its index")?;
            let (sender, receiver) = mpsc::sync_channel(1);
            let file = FileName::new(INDEX);
            let request = Request::new(file, operation, buffer, Patience::DATA);
            self.writer.submit(
                request,
                Box::new(move |outcome| {
                    // Nobody listens any more if it took too long.
                    let _ = sender.send(outcome);
                }),
            );
            let left = until.saturating_duration_since(Instant::now());
            let outcome = receiver.recv_timeout(left);
            let outcome = outcome.map_err(|_| "its index cannot be read: no answer")?;
            let filled = outcome.map_err(|error| format!("its index cannot be read: {error}"))?;
            let mut state = self.lock();
            for (page, bytes) in (page..).zip(filled.bytes().chunks_exact(PAGE)) {
                state.table.load(page, bytes);
            }
            drop(state);
            page += len / PAGE;
        }
        if self.reader.get().is_none() {
            let reader = WorkerSource::start(
                &self.name,
                self.reader_command.clone(),
                Arc::clone(&self.arena),
            );
            let reader = reader.map_err(|error| error.to_string())?;
            let _ = self.reader.set(reader);
        }
        Ok(())
    }

    /// Writes the pages of the index that have changed, as many as there is memory for.
    pub(super) fn flush(&self) {
        loop {
            let Some(mut buffer) = self.buffers.pages().take() else {
                return;
            };
            let page = {
                let mut state = self.lock();
                if !state.writing.may(Instant::now()) {
                    return;
                }
                let Some(page) = state.table.take_dirty() else {
                    return;
                };
                buffer.bytes_mut()[..PAGE].copy_from_slice(&state.table.page(page));
                state.flushing += 1;
                page
            };
            let offset = (1 + page) as u64 * PAGE as u64;
            self.write(INDEX, offset, buffer, PAGE, move |shared, wrote| {
                let mut state = shared.lock();
                state.flushing -= 1;
                if !wrote {
                    state.table.still_dirty(page);
                }
                drop(state);
                shared.changed.notify_all();
            });
        }
    }

    /// Writes the index and waits until that is done, or cannot be.
    pub(super) fn save(&self) {
        let until = Instant::now() + WRITE_ATTEMPT;
        loop {
            if !self.lock().ready {
                return;
            }
            self.flush();
            let state = self.lock();
            let now = Instant::now();
            let over = !state.table.is_dirty() && state.flushing == 0;
            if over || !state.writing.may(now) || now >= until {
                return;
            }
            drop(self.changed.wait_timeout(state, MEMORY_PAUSE));
        }
    }
}
