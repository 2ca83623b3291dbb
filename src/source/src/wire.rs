//! What the daemon and its worker say to each other.
//!
//! One message per packet of a `SOCK_SEQPACKET` pair, little-endian. Both ends
//! are the same binary, so there is no version.
//!
//! Request: id u64, operation u8 (0 read, 1 list, 2 write), fresh u8, zero u16,
//! len u32, file offset u64, place in the arena u64, what it is called in the log
//! u64, path (the rest).
//!
//! Reply: id u64, errno u32 (0: none), len u32, operations u32, text (the rest, with an
//! errno that needs one). The first reply has [`HELLO`] as its id: the worker is ready,
//! or why not.

use crate::{Operation, RequestId};
use rustix::io::Errno;

/// Longest request: the fixed part and a path.
pub(crate) const MAX_REQUEST: usize = REQUEST_HEAD + 4096;
/// Longest reply.
pub(crate) const MAX_REPLY: usize = REPLY_HEAD + 1024;
/// Id of the worker's first reply.
pub(crate) const HELLO: u64 = u64::MAX;

const REQUEST_HEAD: usize = 40;
const REPLY_HEAD: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WireRequest {
    pub id: u64,
    pub operation: Operation,
    /// Bytes that the slot holds; a read's `len` is at most this.
    pub room: usize,
    pub position: usize,
    /// For the log.
    pub request: RequestId,
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WireReply {
    pub id: u64,
    /// Reads and writes of files that the worker has sent since its last reply. Several
    /// requests may share one, and one may need several.
    pub operations: u32,
    pub result: Result<usize, (Errno, String)>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl WireRequest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (operation, fresh, len, offset) = match self.operation {
            Operation::Read { offset, len, fresh } => (0, fresh, len, offset),
            Operation::List => (1, false, self.room, 0),
            Operation::Write { offset, len } => (2, false, len, offset),
        };
        let mut bytes = Vec::with_capacity(REQUEST_HEAD + self.path.len());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend([operation, u8::from(fresh), 0, 0]);
        // A slot is far smaller than 4 GiB.
        bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend((self.position as u64).to_le_bytes());
        bytes.extend(self.request.to_bits().to_le_bytes());
        bytes.extend(self.path.as_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let id = u64_at(bytes, 0)?;
        let len = u32_at(bytes, 12)? as usize;
        let operation = match bytes.get(8)? {
            0 => Operation::Read {
                offset: u64_at(bytes, 16)?,
                len,
                fresh: *bytes.get(9)? != 0,
            },
            1 => Operation::List,
            2 => Operation::Write {
                offset: u64_at(bytes, 16)?,
                len,
            },
            _ => return None,
        };
        Some(Self {
            id,
            operation,
            room: len,
            position: usize::try_from(u64_at(bytes, 24)?).ok()?,
            request: RequestId::from_bits(u64_at(bytes, 32)?),
            path: String::from_utf8(bytes.get(REQUEST_HEAD..)?.to_vec()).ok()?,
        })
    }
}

impl WireReply {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(REPLY_HEAD);
        bytes.extend(self.id.to_le_bytes());
        let (errno, len, text) = match &self.result {
            Ok(len) => (0, *len, ""),
            Err((errno, text)) => (errno.raw_os_error(), 0, text.as_str()),
        };
        bytes.extend(errno.to_le_bytes());
        bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(self.operations.to_le_bytes());
        let text = text.as_bytes();
        bytes.extend(&text[..text.len().min(MAX_REPLY - REPLY_HEAD)]);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let errno = i32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
        let result = if errno == 0 {
            Ok(u32_at(bytes, 12)? as usize)
        } else {
            let text = String::from_utf8_lossy(&bytes[REPLY_HEAD..]).into_owned();
            Err((Errno::from_raw_os_error(errno), text))
        };
        Some(Self {
            id: u64_at(bytes, 0)?,
            operations: u32_at(bytes, 16)?,
            result,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_written() {
        for operation in [
            Operation::List,
            Operation::Read {
                offset: 1 << 40,
                len: 131_072,
                fresh: true,
            },
            Operation::Write {
                offset: 4096,
                len: 131_072,
            },
        ] {
            let request = WireRequest {
                id: 7,
                operation,
                room: 131_072,
                position: 1 << 33,
                request: RequestId::new(3, 9),
                path: "layers/ä".to_owned(),
            };
            assert_eq!(WireRequest::decode(&request.encode()), Some(request));
        }
        for result in [Ok(4096), Err((Errno::STALE, "why".to_owned()))] {
            let reply = WireReply {
                id: HELLO,
                operations: 3,
                result,
            };
            assert_eq!(WireReply::decode(&reply.encode()), Some(reply));
        }
    }

    #[test]
    fn short_messages_are_refused() {
        let request = WireRequest {
            id: 1,
            operation: Operation::List,
            room: 4096,
            position: 0,
            request: RequestId::default(),
            path: String::new(),
        };
        for len in 0..REQUEST_HEAD {
            assert_eq!(WireRequest::decode(&request.encode()[..len]), None);
        }
        for len in 0..REPLY_HEAD {
            let reply = WireReply {
                id: 1,
                operations: 1,
                result: Ok(1),
            };
            assert_eq!(WireReply::decode(&reply.encode()[..len]), None);
        }
    }
}
