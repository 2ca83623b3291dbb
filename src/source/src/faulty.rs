//! A source with faults, for tests: a decorator of the real one.

use crate::request::Errno;
use crate::{Done, Operation, Request, Source, SourceError};
use std::fmt;
use std::time::Duration;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The source answers with this error number, for good.
    Error(i32),
    /// One bit of the byte at this offset of the answer is wrong.
    Flip(usize),
    /// Only so many bytes arrive.
    Truncate(usize),
    /// The answer comes later: the source takes as much longer.
    Delay(Duration),
    /// No answer ever comes.
    Stall,
}

/// Decides, for every request, what goes wrong.
pub type Plan = Box<dyn Fn(&str, Operation) -> Fault + Send + Sync>;

/// A source whose answers go wrong as a plan says.
pub struct Faulty<S> {
    inner: S,
    plan: Plan,
}

impl<S: Source> Faulty<S> {
    /// Puts `plan` before `inner`.
    pub fn new(inner: S, plan: Plan) -> Self {
        Self { inner, plan }
    }
}

impl<S> fmt::Debug for Faulty<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").finish_non_exhaustive()
    }
}

impl<S: Source> Source for Faulty<S> {
    fn submit(&self, mut request: Request, done: Done) {
        let fault = (self.plan)(request.file.as_str(), request.operation);
        let done: Done = match fault {
            Fault::None => done,
            Fault::Error(errno) => {
                let error = SourceError::Failed {
                    file: request.file,
                    origin: self.inner.name().into(),
                    error: Errno(rustix::io::Errno::from_raw_os_error(errno)),
                };
                drop(request.slot);
                return done(Err(error));
            }
            Fault::Flip(at) => Box::new(move |mut outcome| {
                if let Ok(filled) = &mut outcome
                    && let Some(byte) = filled.slot.bytes_mut().get_mut(at)
                {
                    *byte ^= 1;
                }
                done(outcome);
            }),
            Fault::Truncate(len) => Box::new(move |mut outcome| {
                if let Ok(filled) = &mut outcome {
                    filled.len = filled.len.min(len);
                }
                done(outcome);
            }),
            Fault::Delay(time) => {
                let (attempt, late) = (request.patience.attempt, request.late.take());
                Box::new(move |mut outcome| {
                    std::thread::spawn(move || {
                        if let Ok(filled) = &mut outcome {
                            filled.took += time;
                        }
                        std::thread::sleep(time.min(attempt));
                        if let Some(late) = late.filter(|_| time > attempt) {
                            late();
                            std::thread::sleep(time - attempt);
                        }
                        done(outcome);
                    });
                })
            }
            Fault::Stall => {
                let (attempt, late) = (request.patience.attempt, request.late.take());
                std::thread::spawn(move || {
                    std::thread::sleep(attempt);
                    if let Some(late) = late {
                        late();
                    }
                    // Whoever asked has the right to an answer some day.
                    std::mem::forget((done, request.slot));
                });
                return;
            }
        };
        self.inner.submit(request, done);
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}
