//! A request and who asked it.

use crate::{
    Content, Done, FileName, Late, Operation, Patience, Pool, Rejected, Request, RequestId, Slot,
    Source,
};
use std::sync::Arc;

/// A request and who asked it.
pub(super) struct Asked {
    pub(super) file: FileName,
    pub(super) id: RequestId,
    pub(super) operation: Operation,
    pub(super) patience: Patience,
    pub(super) rejected: Rejected,
    pub(super) content: Option<Content>,
    pub(super) late: Option<Late>,
    pub(super) pool: Arc<Pool>,
    pub(super) done: Done,
}

impl Asked {
    pub(super) fn new(request: Request, done: Done) -> (Self, Slot) {
        let asked = Self {
            file: request.file,
            id: request.id,
            operation: request.operation,
            patience: request.patience,
            rejected: request.rejected,
            content: request.content,
            late: request.late,
            pool: Arc::clone(request.slot.pool()),
            done,
        };
        (asked, request.slot)
    }

    pub(super) fn ask(self, source: &dyn Source, slot: Slot) {
        let request = Request {
            id: self.id,
            rejected: self.rejected,
            content: self.content,
            late: self.late,
            ..Request::new(self.file, self.operation, slot, self.patience)
        };
        source.submit(request, self.done);
    }
}
