//! What a worker is as a process: tied to the daemon's life, with nothing of what that has
//! open, in the mount namespace that it is to read.

use super::{WorkerError, failed};
use rustix::thread::LinkNameSpaceType;
use std::os::fd::AsFd;
use std::path::Path;

/// Ties this process's life to the daemon's, which started it, closes everything that it
/// inherited but the three standard files, and joins a mount namespace. The process has
/// one thread yet.
///
/// # Errors
/// One of that failed.
pub fn part_from_daemon(namespace: Option<&Path>) -> Result<(), WorkerError> {
    part()?;
    enter(namespace)
}

pub(super) fn part() -> Result<(), WorkerError> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(failed("cannot tie the worker's life to the daemon's"))?;
    // Whatever the daemon had open (devices above all) must not live as long as this process.
    accel_sys::close_inherited().map_err(failed("cannot close inherited files"))
}

/// Joins a mount namespace. The process has one thread yet.
pub(super) fn enter(namespace: Option<&Path>) -> Result<(), WorkerError> {
    let Some(namespace) = namespace else {
        return Ok(());
    };
    let what = || format!("cannot enter the mount namespace {}", namespace.display());
    let file = std::fs::File::open(namespace).map_err(failed(what()))?;
    let kind = Some(LinkNameSpaceType::Mount);
    rustix::thread::move_into_link_name_space(file.as_fd(), kind).map_err(failed(what()))
}
