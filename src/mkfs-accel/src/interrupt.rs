//! Ctrl-C and SIGTERM: unfinished files go, then the process, with code 130.
//!
//! The signal's own thread does it, so that a converter that waits for a network
//! ends at once too.

use crate::output::complain;
use crate::{exit, progress};
use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

type CleanUp = Box<dyn Fn() + Send>;

static CLEAN_UPS: Mutex<Vec<CleanUp>> = Mutex::new(Vec::new());
static RAISED: AtomicBool = AtomicBool::new(false);

/// Has `clean_up` run when a signal ends the process.
pub fn on_interrupt(clean_up: impl Fn() + Send + 'static) {
    let mut all = CLEAN_UPS.lock().unwrap_or_else(PoisonError::into_inner);
    all.push(Box::new(clean_up));
}

/// Starts to watch for signals.
pub fn watch() -> anyhow::Result<()> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch for signals")?;
    let wait = move || {
        if signals.forever().next().is_some() {
            RAISED.store(true, Ordering::SeqCst);
            let all = CLEAN_UPS.lock().unwrap_or_else(PoisonError::into_inner);
            for clean_up in all.iter() {
                clean_up();
            }
            progress::clear();
            complain!("interrupted; unfinished files were removed");
            std::process::exit(exit::INTERRUPTED.into());
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("cannot start a thread")?;
    Ok(())
}

/// Does not return if a signal is ending the process.
pub fn wait_if_interrupted() {
    while RAISED.load(Ordering::SeqCst) {
        thread::park();
    }
}
