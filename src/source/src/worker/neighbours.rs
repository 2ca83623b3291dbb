//! Neighbours are read together: what a daemon asks for in one breath (a request of the
//! kernel that spans chunks, metadata that is fetched ahead) comes together, and to a server
//! each read is a round trip.

use super::{Job, Tag, Worker, WorkerError, submitting};
use accel_sys::Outcome;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::rc::Rc;

/// Reads of neighbouring ranges that come together become one, of at most so many bytes.
const LONGEST_READ: usize = 1 << 20;

/// A read into the slots of several jobs, whose ranges follow each other.
pub(super) struct Run {
    /// Their places, in the order of the file.
    jobs: Vec<usize>,
    /// Where their bytes go.
    places: Vec<Range<usize>>,
}

impl Job {
    /// Whether it is a read of which nothing has been tried yet, and whose file is open.
    pub(super) fn may_join(&self) -> bool {
        let begun = self.filled > 0 || self.ended.is_some();
        self.file.is_some() && !(begun || self.write || self.fresh || self.alone)
    }

    /// Whether `next` begins in the same file where this ends, and is as urgent.
    fn is_followed_by(&self, next: &Self) -> bool {
        let same = match (&self.file, &next.file) {
            (Some(one), Some(other)) => Rc::ptr_eq(one, other),
            _ => false,
        };
        same && self.want == self.span()
            && self.offset + self.want as u64 == next.offset
            && self.request.is_background() == next.request.is_background()
    }
}

impl Worker {
    /// Sends the reads that have gathered: neighbours in one.
    pub(super) fn send_ready(&mut self) -> Result<(), WorkerError> {
        let mut ready = std::mem::take(&mut self.ready);
        let place = |index: &usize| {
            let job = self.jobs[*index].as_deref();
            job.map(|job| (job.file.as_ref().map(Rc::as_ptr), job.offset))
        };
        ready.sort_by_key(place);
        let mut rest = ready.into_iter().peekable();
        while let Some(first) = rest.next() {
            let (mut jobs, mut last) = (vec![first], first);
            let span = |at: usize| self.jobs[at].as_ref().map_or(0, |job| job.span());
            let mut bytes = span(first);
            while let Some(&next) = rest.peek() {
                let follows = match (&self.jobs[last], &self.jobs[next]) {
                    (Some(last), Some(next)) => last.is_followed_by(next),
                    _ => false,
                };
                bytes += span(next);
                if !follows || bytes > LONGEST_READ {
                    break;
                }
                rest.next();
                jobs.push(next);
                last = next;
            }
            if jobs.len() > 1 {
                self.send_run(jobs)?;
            } else if let Some(job) = self.jobs[first].take() {
                self.send(first, job)?;
            }
        }
        Ok(())
    }

    /// Sends one read for all these jobs.
    fn send_run(&mut self, jobs: Vec<usize>) -> Result<(), WorkerError> {
        let all = jobs.iter().filter_map(|&index| self.jobs[index].as_ref());
        let places: Vec<_> = all
            .map(|job| job.position..job.position + job.span())
            .collect();
        let first = jobs.first().and_then(|&first| self.jobs[first].as_deref());
        let Some(Job {
            file: Some(file),
            offset,
            ..
        }) = first
        else {
            return self.send_alone(&jobs);
        };
        let number = self.free_runs.pop().unwrap_or_else(|| {
            self.runs.push(None);
            self.runs.len() - 1
        });
        self.operations += 1;
        let tag = Tag::Run(number);
        let sent = self
            .ring
            .read_places(tag, file.fd.as_fd(), *offset, places.iter().cloned());
        self.runs[number] = Some(Run { jobs, places });
        sent.map_err(submitting)
    }

    /// Sends a read for each of these jobs.
    fn send_alone(&mut self, jobs: &[usize]) -> Result<(), WorkerError> {
        for &index in jobs {
            if let Some(mut job) = self.jobs[index].take() {
                job.alone = true;
                self.send(index, job)?;
            }
        }
        Ok(())
    }

    /// The read for several jobs has ended with so many bytes, or an error.
    pub(super) fn run_ended(
        &mut self,
        number: usize,
        read: Option<u32>,
    ) -> Result<(), WorkerError> {
        let Some(Run { jobs, places }) = self.runs.get_mut(number).and_then(Option::take) else {
            return Ok(());
        };
        self.free_runs.push(number);
        // An error may be one job's alone.
        let mut left = read.unwrap_or(0) as usize;
        for (at, (&index, place)) in jobs.iter().zip(&places).enumerate() {
            let read = left.min(place.len());
            if read == 0 {
                // It ended before these: they find out whether that is the file's end.
                return self.send_alone(&jobs[at..]);
            }
            left -= read;
            // No longer than a slot.
            let read = u32::try_from(read).unwrap_or(u32::MAX);
            self.advance(index, Ok(Outcome::Count(read)))?;
        }
        Ok(())
    }
}
