//! The checks, each a function that says what is wrong.
//!
//! | module | what has to hold |
//! |---|---|
//! | [`trees`] | a mounted image is the ordinary unpack; its program runs and prints the same |
//! | [`reads`] | an exported device has the bytes of the published file, however it is read |
//! | [`damage`] | bytes that changed on UFS are I/O errors, and nothing else is |
//! | [`lifecycle`] | unmounting and stopping leave nothing behind; a killed daemon is not noticed |
//! | [`containers`] | what runs on the snapshotter's layers is named, and left alone |
//! | [`limits`] | too little of what a daemon needs harms nothing that runs |
//! | [`fio`] | neither does fio notice, which verifies what it reads |
//! | [`snapshots`] | what the snapshotter answers is what a plain model says, whatever dies meanwhile |
//! | [`trust`] | which layers it takes on the word of UFS |
//! | [`native`] | what containerd mounts itself is the ordinary unpack |
//! | [`mounting`] | an image is mounted with hardly a byte of UFS, however large it is |
//! | [`jobs`] | what a cluster's Jobs do with UFS they can do on NFS, with what they have |
//! | [`usage`] | wrong usage is answered with what is wrong |

use anyhow::Result;
use libtest_mimic::Trial;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Setting, fixture, nfs};

pub mod containers;
pub mod damage;
pub mod fio;
pub mod jobs;
pub mod lifecycle;
pub mod limits;
pub mod mounting;
pub mod native;
pub mod reads;
pub mod snapshots;
pub mod trees;
pub mod trust;
pub mod usage;

type Check = fn(&Setting) -> Result<()>;

/// All checks for these fixtures, in the order in which they are useful to read.
///
/// # Errors
/// When the fixtures are incomplete.
pub fn all(setting: &Setting) -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for image in fixture::images(setting)? {
        type OfImage = fn(&Setting, &fixture::Image) -> Result<()>;
        let of_image: [(&str, OfImage); 4] = [
            ("mounted_with_at_most_1_mib", mounting::takes_at_most_1_mib),
            (
                "tree_is_the_ordinary_unpack",
                trees::tree_is_the_ordinary_unpack,
            ),
            (
                "program_runs_and_prints_the_same",
                trees::program_runs_and_prints_the_same,
            ),
            (
                "device_has_the_published_bytes",
                reads::device_has_the_published_bytes,
            ),
        ];
        for (name, check) in of_image {
            let (setting, image) = (setting.clone(), image.clone());
            trials.push(trial(
                &format!("{}::{name}", image.name.clone()),
                move || check(&setting, &image),
            ));
        }
    }
    let ublk: &[(&str, Check)] = &[
        (
            "mount::udev_leaves_devices_alone",
            mounting::udev_leaves_devices_alone,
        ),
        (
            "lifecycle::unknown_devices_are_removed_when_unused",
            lifecycle::unknown_devices_are_removed_when_unused,
        ),
        (
            "lifecycle::device_not_noted_is_removed_at_start",
            lifecycle::device_not_noted_is_removed_at_start,
        ),
        (
            "lifecycle::damaged_entry_costs_its_device_alone",
            lifecycle::damaged_entry_costs_its_device_alone,
        ),
        (
            "lifecycle::newer_journal_is_refused_and_devices_left",
            lifecycle::newer_journal_is_refused_and_devices_left,
        ),
        (
            "lifecycle::removal_of_a_device_in_use_is_taken_back",
            lifecycle::removal_of_a_device_in_use_is_taken_back,
        ),
        (
            "limits::reads_go_on_when_memory_is_short",
            limits::reads_go_on_when_memory_is_short,
        ),
        ("fio::verifies_through_kills", fio::verifies_through_kills),
        (
            "fio::sees_damage_and_lost_devices",
            fio::sees_damage_and_lost_devices,
        ),
        (
            "limits::attach_without_descriptors_is_refused",
            limits::attach_without_descriptors_is_refused,
        ),
        (
            "limits::limit_of_devices_is_no_limit_or_named",
            limits::limit_of_devices_is_no_limit_or_named,
        ),
        (
            "lifecycle::lost_device_in_use_is_in_nobodys_way",
            lifecycle::lost_device_in_use_is_in_nobodys_way,
        ),
    ];
    let others: [(&str, Check); 27] = [
        (
            "mount::large_layer_with_at_most_1_mib",
            mounting::large_layer_takes_at_most_1_mib,
        ),
        (
            "mount::by_manifest_digest",
            trees::mounts_by_manifest_digest,
        ),
        (
            "mount::writes_go_to_the_upper_directory",
            trees::writes_go_to_the_upper_directory,
        ),
        (
            "damage::flipped_byte_fails_the_reads_that_touch_it",
            damage::flipped_byte,
        ),
        (
            "damage::truncation_fails_the_reads_beyond",
            damage::truncation,
        ),
        (
            "damage::damaged_index_never_gives_wrong_bytes",
            damage::damaged_index,
        ),
        (
            "damage::damaged_start_file_is_done_without",
            damage::damaged_start_file,
        ),
        (
            "damage::without_verification_the_check_fails",
            damage::without_verification_the_check_fails,
        ),
        (
            "lifecycle::unmount_leaves_nothing",
            lifecycle::unmount_leaves_nothing,
        ),
        (
            "lifecycle::images_share_layers",
            lifecycle::images_share_layers,
        ),
        (
            "lifecycle::killed_daemon_is_succeeded",
            lifecycle::killed_daemon_is_succeeded,
        ),
        (
            "lifecycle::every_succession_goes_unnoticed",
            lifecycle::every_succession_goes_unnoticed,
        ),
        (
            "lifecycle::broken_program_is_rescued",
            lifecycle::broken_program_is_rescued,
        ),
        (
            "lifecycle::serves_in_a_sandbox",
            lifecycle::serves_in_a_sandbox,
        ),
        (
            "containers::shutdown_names_them_and_lets_them_run",
            containers::shutdown_names_them_and_lets_them_run,
        ),
        (
            "containers::shutdown_leaves_mounted_images_to_them",
            containers::shutdown_leaves_mounted_images_to_them,
        ),
        (
            "lifecycle::stop_leaves_nothing",
            lifecycle::stop_leaves_nothing,
        ),
        (
            "snapshots::mixed_chains_are_the_model",
            snapshots::mixed_chains_are_the_model,
        ),
        (
            "snapshots::a_stopped_server_is_not_waited_for",
            snapshots::a_stopped_server_is_not_waited_for,
        ),
        (
            "trust::ufs_is_trusted_only_if_told_to",
            trust::ufs_is_trusted_only_if_told_to,
        ),
        (
            "native::containerd_mounts_the_devices",
            native::containerd_mounts_the_devices,
        ),
        (
            "limits::full_disk_of_the_log_harms_nothing",
            limits::full_disk_of_the_log_harms_nothing,
        ),
        ("usage::missing_ufs", usage::missing_ufs),
        ("usage::image_not_converted", usage::image_not_converted),
        ("usage::mount_point_missing", usage::mount_point_missing),
        ("usage::second_daemon", usage::second_daemon),
        ("usage::no_daemon", usage::no_daemon),
    ];
    let ublk = ublk.iter().filter(|_| setting.transport == "ublk");
    for (name, check) in others.into_iter().chain(ublk.copied()) {
        let setting = setting.clone();
        trials.push(trial(name, move || check(&setting)));
    }
    // Few machines have server and client; the guests do.
    let has_nfs = Path::new("/run/guest").exists() || nfs::is_possible();
    let setting = setting.clone();
    let on_nfs = trial("jobs::work_on_nfs", move || jobs::work_on_nfs(&setting));
    trials.push(on_nfs.with_ignored_flag(!has_nfs));
    Ok(trials)
}

/// How long each check has taken.
static TAKEN: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// The `count` checks that have taken longest, the longest first.
pub fn longest(count: usize) -> Vec<(Duration, String)> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    taken.sort_unstable_by(|a, b| b.cmp(a));
    taken.truncate(count);
    taken
}

fn trial(name: &str, check: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    let known_as = name.to_owned();
    Trial::test(name, move || {
        let since = Instant::now();
        let result = check();
        let taken = (since.elapsed(), known_as);
        TAKEN
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(taken);
        result.map_err(|error| format!("{error:#}").into())
    })
}
