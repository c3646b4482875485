//! What the keeper parks of the images in use, so that their locks outlive the server: of the image itself and of all that it rests on.
//!
//! | name | what |
//! |---|---|
//! | `image A` | the image A: its locked descriptor, which the next server uses, and the O_PATH one |
//! | `beneath 0 A`, `beneath 1 A` ... | A's backing file, and that one's ...: locked. The next server opens and locks them itself |
//!
//! A backing file that two images have is parked for each of them: it is locked until both let it go.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use super::opening::locked_descriptor;
use crate::fuse::KeeperLink;
use crate::image::{DescriptorRole, Image};
use crate::sync::{Arc, Mutex};

/// See the module.
pub(super) struct Parking {
    link: Arc<KeeperLink>,
    /// How many layers are parked beneath an image.
    beneath: Mutex<BTreeMap<String, usize>>,
}

/// The name under which the keeper parks an image's descriptors: the image's, since a restart looks for what the record names.
pub(super) fn parking_name(image: &str) -> String {
    format!("image {image}")
}

fn name_beneath(image: &str, number: usize) -> String {
    format!("beneath {number} {image}")
}

/// The image that `name` belongs to, and the number of the layer beneath it.
fn parse(name: &str) -> Option<(&str, Option<usize>)> {
    if let Some(image) = name.strip_prefix("image ") {
        return Some((image, None));
    }
    let (number, image) = name.strip_prefix("beneath ")?.split_once(' ')?;
    Some((image, Some(number.parse().ok()?)))
}

impl Parking {
    pub(super) fn new(link: Arc<KeeperLink>) -> Self {
        Parking { link, beneath: Mutex::new(BTreeMap::new()) }
    }

    /// Parks what an image, and what it rests on, offers.
    pub(super) fn park(&self, image: &dyn Image) {
        for (role, descriptor) in image.descriptors() {
            self.park_one(&parking_name(image.name()), role, descriptor);
        }
        let layers: Vec<_> = std::iter::successors(image.backing(), |layer| layer.backing()).collect();
        let mut beneath = self.beneath.lock();
        for (number, layer) in layers.iter().enumerate() {
            if let Some(descriptor) = locked_descriptor(&***layer) {
                self.park_one(&name_beneath(image.name(), number), DescriptorRole::Locked, descriptor);
            }
        }
        let before = beneath.insert(image.name().to_owned(), layers.len()).unwrap_or(0);
        self.unpark_beneath(image.name(), layers.len()..before);
    }

    /// Lets the keeper close what it parks of an image: its locks end with our own use of it.
    pub(super) fn unpark(&self, image: &str) {
        for role in [DescriptorRole::Locked, DescriptorRole::Path] {
            self.unpark_one(&parking_name(image), role);
        }
        let mut beneath = self.beneath.lock();
        let count = beneath.remove(image).unwrap_or(0);
        self.unpark_beneath(image, 0..count);
    }

    /// Learns that `name` has been parked since an earlier server. What is no image that is `used` is let go.
    pub(super) fn inherit(&self, name: &str, used: impl Fn(&str) -> bool) {
        let Some((image, number)) = parse(name) else { return };
        if let Some(number) = number {
            let mut beneath = self.beneath.lock();
            let count = beneath.entry(image.to_owned()).or_insert(0);
            *count = (*count).max(number + 1);
        }
        if !used(image) {
            self.unpark(image);
        }
    }

    fn park_one(&self, name: &str, role: DescriptorRole, descriptor: BorrowedFd<'_>) {
        if let Err(error) = self.link.park(name, role, descriptor) {
            log::warn!("{error}");
        }
    }

    fn unpark_one(&self, name: &str, role: DescriptorRole) {
        if let Err(error) = self.link.unpark(name, role) {
            log::warn!("{error}");
        }
    }

    fn unpark_beneath(&self, image: &str, numbers: std::ops::Range<usize>) {
        for number in numbers {
            self.unpark_one(&name_beneath(image, number), DescriptorRole::Locked);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn names_tell_image_and_layer() {
        for image in ["/disk.qcow2", "/a name with 1 space.qcow2", "nbd://host/beneath 1 x"] {
            assert_eq!(parse(&parking_name(image)), Some((image, None)));
            assert_eq!(parse(&name_beneath(image, 12)), Some((image, Some(12))));
        }
        assert_eq!(parse("nbd connection"), None);
    }
}
