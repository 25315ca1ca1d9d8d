// Images to send along: made small enough for a model and for a request.

const LONGEST_SIDE = 1280;
const MOST_BYTES = 30_000_000;

/** An image file as a data: address, JPEG of at most 1280 pixels a side. Throws where it is no image. */
export async function shrink(file: File): Promise<string> {
  if (!file.type.startsWith("image/") || file.size > MOST_BYTES) throw new Error(`${file.name} is not an image that can be sent.`);
  const picture = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} cannot be read as an image.`);
  });
  const scale = Math.min(1, LONGEST_SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  if (context === null) throw new Error("This browser cannot draw images.");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
  return canvas.toDataURL("image/jpeg", 0.88);
}
