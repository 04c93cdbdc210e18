//! Selection of NICs by PCI address, by network interface, or by a pattern of addresses.

use glob::Pattern;
use vireo_bus_pci::PciInfo;
use vireo_eal::args::quoted;
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result};

use crate::host::Host;

const HINT: &str = "list them: vireo-devbind --status";

impl Host {
    /// Returns the functions that `words` name, each once, in the order of the words.
    pub(crate) fn select(&self, words: &[String]) -> Result<Vec<Bdf>> {
        self.bus.require()?;
        let mut chosen = Vec::new();
        for word in words {
            for address in self.named(word)? {
                if !chosen.contains(&address) {
                    chosen.push(address);
                }
            }
        }
        Ok(chosen)
    }

    fn named(&self, word: &str) -> Result<Vec<Bdf>> {
        if word.contains(['*', '?', '[']) {
            return self.matching(word);
        }
        match word.parse() {
            Ok(address) => Ok(vec![address]),
            // Interface names have no colon (`dev_valid_name` in the kernel), so this is a mistyped address.
            Err(error) if word.contains(':') => Err(error),
            Err(_) => self.with_interface(word).map(|address| vec![address]),
        }
    }

    /// Returns the Ethernet controllers that match a pattern. Other devices are excluded, because a pattern
    /// such as `0000:00:*` would also match the disk controller.
    fn matching(&self, word: &str) -> Result<Vec<Bdf>> {
        let what = || format!("cannot find {}", quoted(word));
        let pattern = Pattern::new(word).map_err(|error| {
            Error::new(ErrorKind::Usage, what(), format!("it is not a valid pattern: {}", error.msg))
                .with_hint(HINT)
        })?;
        let matches = |info: &PciInfo| {
            let full = info.address.to_string();
            pattern.matches(&full) || full.strip_prefix("0000:").is_some_and(|short| pattern.matches(short))
        };
        let found: Vec<Bdf> = self
            .bus
            .scan()?
            .into_iter()
            .filter(|info| info.is_ethernet() && matches(info))
            .map(|info| info.address)
            .collect();
        if found.is_empty() {
            let why = "no Ethernet controller has a matching address";
            return Err(Error::new(ErrorKind::Unavailable, what(), why).with_hint(HINT));
        }
        Ok(found)
    }

    fn with_interface(&self, name: &str) -> Result<Bdf> {
        let has =
            |info: &PciInfo| self.interfaces(info.address).iter().any(|interface| interface.name == name);
        self.bus.scan()?.into_iter().find(has).map(|info| info.address).ok_or_else(|| {
            let what = format!("cannot find {}", quoted(name));
            let why = "it is not a PCI address, and no PCI device has a network interface of that name";
            Error::new(ErrorKind::Unavailable, what, why).with_hint(HINT)
        })
    }
}
