#!/usr/bin/env bash
# Install the system packages that tests and benchmarks need, where they are missing.
#
#   tools/system_packages.sh [GROUP...]     groups: tests (the default), vulkan, bench, browser, sanitized, service,
#                                         container
#
# Installs by apt-get as root on Debian and its relatives. Elsewhere it says what is missing and how to get it, and
# fails. With everything there it only looks for the programs, and asks no package manager.
set -euo pipefail

# group | programs or files, any of which will do | Debian package | what for
needs='
tests   | c++ g++ clang++                 | g++      | building the RPC plugin of the embedded engine
service | systemd-analyze                 | systemd  | the unit of `mesh-llm service`, judged and run by systemd
vulkan  | glslc                           | glslc    | the shaders of the Vulkan plugin
vulkan  | /usr/lib/*/libvulkan.so.1 /usr/lib64/libvulkan.so.1 /usr/lib/libvulkan.so.1 | libvulkan1 | linking the Vulkan plugin
vulkan  | /usr/share/vulkan/icd.d/lvp_icd*.json | mesa-vulkan-drivers | a Vulkan device without a GPU
bench   | nginx                           | nginx    | the proxy to compare with
sanitized | cmake                         | cmake    | building the sanitised rpc-server of the firewall tests
sanitized | c++ g++ clang++               | g++      | building the sanitised rpc-server of the firewall tests
container | debootstrap                 | debootstrap | the base of the image that `make container` makes
browser | chromium chromium-browser google-chrome | chromium | tests of the console page
browser | nginx                           | nginx    | the proxy with TLS before that page
browser | openssl                         | openssl  | the certificate of that proxy
'

known_groups='tests vulkan bench browser sanitized service container'
wanted_groups="${*:-tests}"
for group in $wanted_groups; do
  if [[ " $known_groups " != *" $group "* ]]; then
    echo "system_packages: no group '$group'; there are: $known_groups" >&2
    exit 2
  fi
done

packages=()
missing=
while IFS='|' read -r group programs package reason; do
  read -r group <<<"$group"
  if [[ -z $group || " $wanted_groups " != *" $group "* ]]; then continue; fi
  found=
  for program in $programs; do
    if [[ $program == /* ]]; then
      if compgen -G "${SYSTEM_ROOT-}$program" >/dev/null; then found=yes; fi
      continue
    fi
    # nginx and the like live in sbin, which an ordinary user's PATH often lacks.
    if PATH="$PATH:${SYSTEM_PATH-/usr/sbin:/sbin}" command -v "$program" >/dev/null; then found=yes; fi
  done
  if [[ -z $found ]]; then
    read -r package <<<"$package"
    read -r reason <<<"$reason"
    packages+=("$package")
    missing="${missing:+$missing, }$package ($reason)"
  fi
done <<<"$needs"

if ((${#packages[@]} == 0)); then exit 0; fi

if ! command -v apt-get >/dev/null; then
  echo "system_packages: missing: $missing. Install with this system's package manager, then run the command again." >&2
  exit 1
fi
if [[ $(id -u) != 0 ]]; then
  echo "system_packages: missing: $missing. Install with: sudo apt-get install ${packages[*]}" >&2
  exit 1
fi

# Debian starts a server as soon as it is installed: here a program is wanted, not an open port on this machine.
# invoke-rc.d asks this file first, and takes 101 for "do not".
policy=${SERVICE_POLICY_FILE:-/usr/sbin/policy-rc.d}
if [[ " ${packages[*]} " == *" nginx "* && ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi

echo "Installing system packages: $missing ..."
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --yes --quiet --quiet --no-install-recommends "${packages[@]}" </dev/null; }
# A fresh machine has no package lists, and an old one names versions that are gone: then they are fetched first.
if ! install >/dev/null 2>&1; then
  apt-get update --quiet --quiet
  install >/dev/null
fi
