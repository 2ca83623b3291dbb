//! What a mount will ask for is read before it asks.
//!
//! The kernel reads the superblock, then the root directory, one after the other; both
//! are known beforehand. Nothing else is read: where nobody mounts, nothing more than
//! this is wasted. Of a layer that came with its start nothing is read before the mount,
//! and the chunk with the root directory after it.

use super::content::{Content as _, PageLoad};
use super::pending::{Pending, Piece};
use super::{Engine, Export};
use accel_cache::Lookup;
use accel_source::{Rejected, RequestId};
use accel_ufs::index::{ChunkNo, PAGE_SIZE, Step};
use std::sync::Arc;

/// Nobody waits for what is read ahead: who needs it joins the read, or meets the same
/// error.
struct Unasked(RequestId);

impl Pending for Unasked {
    fn fill(&self, _at: usize, _bytes: &[u8]) {}
    fn fail(&self, _reason: &str) {}
    fn waits(&self) {}
    fn id(&self) -> RequestId {
        self.0
    }
}

impl Engine {
    /// Begins to read what mounting `export` takes. Waits for nothing.
    pub fn expect_mount(self: &Arc<Self>, export: &Arc<Export>) {
        let first = ChunkNo::containing(export.metadata.offset);
        let chunks = [ChunkNo(0), first];
        self.expect(
            export,
            &chunks[..if first == ChunkNo(0) { 1 } else { 2 }],
            export.expected(),
        );
    }

    /// Begins to read what is looked at first once `export`, of which only the start was
    /// read so far, is mounted. Waits for nothing.
    pub fn expect_look(self: &Arc<Self>, export: &Arc<Export>) {
        if export.lacks_index() && export.complete().is_none() {
            let first = ChunkNo::containing(export.metadata.offset);
            self.expect(export, &[first], export.background());
        }
    }

    fn expect(self: &Arc<Self>, export: &Arc<Export>, chunks: &[ChunkNo], request: RequestId) {
        let pending = Arc::new(Unasked(request));
        for &chunk in chunks {
            // What the index says of its metadata is a hint, and may be past the end.
            let Some(piece) = Piece::of_no_bytes(export, chunk, Arc::<Unasked>::clone(&pending))
            else {
                continue;
            };
            self.place_top(&piece);
            self.serve(piece);
        }
    }

    /// Puts the page that came with the header into the cache, once it is verified. One
    /// that is wrong is read again like any other.
    fn place_top(self: &Arc<Self>, piece: &Piece) {
        let Some((bytes, origin)) = piece.export.take_top() else {
            return;
        };
        let Step::Fetch {
            page,
            range,
            expected,
        } = piece.walk.step()
        else {
            return;
        };
        let park = || {
            let load = PageLoad::new(&piece.export, page, range, piece.pending.id());
            (piece.clone(), load)
        };
        let Lookup::Lead(mut load) = self.pages.lookup(expected, park) else {
            return;
        };
        match load.what.check(&*bytes, expected) {
            Ok(()) => {
                load.slot.bytes_mut()[..PAGE_SIZE].copy_from_slice(&*bytes);
                let (guard, waiters) = self.pages.complete(expected, load.slot, PAGE_SIZE);
                self.source
                    .verified(PageLoad::identity(expected), &*bytes, &origin);
                PageLoad::give(self, guard, waiters);
                self.start_waiting::<PageLoad>();
            }
            Err(_) => self.load(load, Rejected::default()),
        }
    }
}
